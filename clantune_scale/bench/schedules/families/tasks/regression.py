"""Regression: a teacher network, heavy-tailed noise, a picture by place, ill-conditioned least squares."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from clantune_scale.bench.batched.model import Knobs, Tensors
from clantune_scale.bench.schedules.families.draw import Draw
from clantune_scale.bench.schedules.families.networks import Perceptron
from clantune_scale.bench.schedules.families.registry import TaskFamily, register
from clantune_scale.bench.schedules.families.task import SampledTask
from clantune_scale.bench.schedules.problems.layers import affine, normal_parameters


class Teacher(SampledTask):
    """The outputs of a random network, with noise, for inputs whose features differ in scale.

    Args:
        draw: of sizes, noise and data.
        turned: how far the teacher's weights are from those of the same draw at 0, as a share, 0 to 1.
    """

    HIDDEN = 24

    def __init__(self, draw: Draw, *, turned: float = 0.0) -> None:
        features, outputs = draw.whole(6, 32), draw.choice((1, 1, 3))
        self._scales = torch.logspace(0, -draw.uniform(0.0, 1.5), features)
        self._noise = draw.choice((0.0, 0.1, 0.3, 0.6))
        self._student = Perceptron.drawn(draw, features, outputs)
        shapes = [((features, self.HIDDEN), 1.5 * features**-0.5), ((self.HIDDEN, outputs), 1.5 * self.HIDDEN**-0.5)]
        first, other = (normal_parameters(draw.key(), shapes) for _ in range(2))
        share = math.sin(turned * math.pi / 2)
        self._teacher = [
            math.sqrt(1 - share**2) * mine + share * theirs for mine, theirs in zip(first, other, strict=True)
        ]
        self.collect(draw)

    def init(self, seed: int) -> Tensors:
        return self._student.init(seed)

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        return (self._student(parameters, batch[0]) - batch[1]).square().mean(dim=-1)

    def samples(self, generator: torch.Generator, count: int, part: str) -> list[torch.Tensor]:
        inputs = self._scales * torch.randn(count, len(self._scales), generator=generator)
        clean = torch.tanh(inputs @ self._teacher[0]) @ self._teacher[1]
        return [inputs, clean + self._noise * torch.randn(clean.shape, generator=generator)]


class HeavyTails(SampledTask):
    """Targets under noise of a Student distribution with two degrees of freedom, absolute or Huber loss."""

    def __init__(self, draw: Draw) -> None:
        features = draw.whole(6, 24)
        self._weights = torch.randn(features, 2, generator=torch.Generator().manual_seed(draw.key()))
        self._noise, self._is_absolute = draw.log_uniform(0.1, 1.0), draw.chance(0.5)
        self._network = Perceptron.drawn(draw, features, 1)
        self.collect(draw)

    def init(self, seed: int) -> Tensors:
        return self._network.init(seed)

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        error = self._network(parameters, batch[0]).squeeze(-1) - batch[1]
        return (
            error.abs()
            if self._is_absolute
            else functional.huber_loss(error, torch.zeros_like(error), reduction="none")
        )

    def samples(self, generator: torch.Generator, count: int, part: str) -> list[torch.Tensor]:
        inputs = torch.randn(count, len(self._weights), generator=generator)
        along, across = (inputs @ (self._weights * len(self._weights) ** -0.5)).unbind(dim=1)
        normal, squares = torch.randn(2, count, 2, generator=generator)
        # A normal number over the root of a chi square of two degrees, each divided by two.
        noise = normal[:, 0] / squares.square().mean(dim=1).sqrt().clamp(min=1e-2)
        return [inputs, torch.sin(2 * along) + across.abs() + self._noise * noise]


class Coordinates(SampledTask):
    """A picture made of waves, as a function of place: a network over random Fourier features (Tancik et al. 2020)."""

    def __init__(self, draw: Draw) -> None:
        generator = torch.Generator().manual_seed(draw.key())
        waves, features = draw.whole(3, 12), draw.choice((8, 16, 24))
        self._waves = 6.0 * torch.randn(2, waves, generator=generator)
        self._heights = torch.randn(waves, generator=generator) / math.sqrt(waves)
        self._features = draw.uniform(2.0, 8.0) * torch.randn(2, features, generator=generator)
        self._network = Perceptron.drawn(draw, 2 * features, 1)
        self.collect(draw)

    def init(self, seed: int) -> Tensors:
        return self._network.init(seed)

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        return (self._network(parameters, batch[0]).squeeze(-1) - batch[1]).square()

    def samples(self, generator: torch.Generator, count: int, part: str) -> list[torch.Tensor]:
        places = torch.rand(count, 2, generator=generator)
        angles = places @ self._features
        return [torch.cat([angles.sin(), angles.cos()], dim=1), torch.sin(places @ self._waves) @ self._heights]


class LeastSquares(SampledTask):
    """Linear regression, convex, with a condition number of 10 to 10,000."""

    def __init__(self, draw: Draw) -> None:
        features = draw.whole(16, 128)
        generator = torch.Generator().manual_seed(draw.key())
        # The condition number is that of the covariance.
        self._scales = torch.logspace(0, -0.5 * draw.uniform(1.0, 4.0), features)
        mixing = torch.linalg.qr(torch.randn(features, features, generator=generator))[0]
        self._mixing = mixing if draw.chance(0.5) else torch.eye(features)
        self._weights = torch.randn(features, 1, generator=generator)
        self._noise = draw.choice((0.0, 0.0, 0.1, 0.5))
        self.collect(draw)

    def init(self, seed: int) -> Tensors:
        return [torch.zeros(len(self._scales), 1), torch.zeros(1)]

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        return 0.5 * (affine(batch[0], *parameters).squeeze(-1) - batch[1]).square()

    def samples(self, generator: torch.Generator, count: int, part: str) -> list[torch.Tensor]:
        inputs = (self._scales * torch.randn(count, len(self._scales), generator=generator)) @ self._mixing
        return [inputs, (inputs @ self._weights).squeeze(1) + self._noise * torch.randn(count, generator=generator)]


register(TaskFamily("teacher", Teacher))
register(TaskFamily("heavy tails", HeavyTails))
register(TaskFamily("coordinates", Coordinates))
register(TaskFamily("least squares", LeastSquares))
