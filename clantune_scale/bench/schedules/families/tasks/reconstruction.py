"""Reconstruction: an autoencoder, a matrix from some of its entries, a denoiser."""

from __future__ import annotations

import math

import torch

from clantune_scale.bench.batched.model import Knobs, Tensors
from clantune_scale.bench.schedules.families.draw import Draw
from clantune_scale.bench.schedules.families.networks import Perceptron
from clantune_scale.bench.schedules.families.registry import TaskFamily, register
from clantune_scale.bench.schedules.families.task import SampledTask
from clantune_scale.bench.schedules.problems.layers import embed, normal_parameters


class Autoencoder(SampledTask):
    """Points near a curved surface of few dimensions, through a bottleneck that is as narrow, or one narrower."""

    def __init__(self, draw: Draw) -> None:
        inside, features = draw.choice((2, 3, 5)), draw.whole(12, 40)
        generator = torch.Generator().manual_seed(draw.key())
        self._surface = torch.randn(inside, features, generator=generator)
        self._shift = torch.rand(features, generator=generator) * 2 * math.pi
        self._noise, hidden = draw.choice((0.0, 0.1, 0.3)), draw.whole(16, 40)
        bottleneck = inside - draw.choice((0, 1))
        activation = draw.choice(("tanh", "relu", "gelu"))
        self._network = Perceptron((features, hidden, bottleneck, hidden, features), activation, gain=1.2)
        self.collect(draw)

    def init(self, seed: int) -> Tensors:
        return self._network.init(seed)

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        return (self._network(parameters, batch[0]) - batch[0]).square().mean(dim=-1)

    def samples(self, generator: torch.Generator, count: int, part: str) -> list[torch.Tensor]:
        inside = torch.randn(count, len(self._surface), generator=generator)
        points = torch.sin(inside @ self._surface + self._shift)
        return [points + self._noise * torch.randn(points.shape, generator=generator)]


class Factorization(SampledTask):
    """A matrix of low rank from noisy entries, by two factors that start small."""

    def __init__(self, draw: Draw) -> None:
        rows, columns, rank = draw.whole(20, 60), draw.whole(20, 60), draw.choice((1, 2, 4))
        generator = torch.Generator().manual_seed(draw.key())
        strengths = torch.logspace(0, -draw.uniform(0.0, 1.0), rank)
        left, right = (torch.randn(size, rank, generator=generator) for size in (rows, columns))
        self._matrix = (left * strengths) @ right.T
        self._noise, self._rank = draw.choice((0.0, 0.1, 0.5)), rank + draw.choice((0, 0, 2))
        self._start = draw.log_uniform(0.03, 0.5)
        self.collect(draw)

    def init(self, seed: int) -> Tensors:
        return normal_parameters(seed, [((size, self._rank), self._start) for size in self._matrix.shape])

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        left, right = (embed(table, batch[0][..., side]) for side, table in enumerate(parameters))
        return ((left * right).sum(dim=-1) - batch[1]).square()

    def samples(self, generator: torch.Generator, count: int, part: str) -> list[torch.Tensor]:
        sides = [torch.randint(0, size, (count,), generator=generator) for size in self._matrix.shape]
        entries = self._matrix[sides[0], sides[1]]
        return [torch.stack(sides, dim=1), entries + self._noise * torch.randn(count, generator=generator)]


class Denoiser(SampledTask):
    """The noise in points of a ring of clusters, at all levels of noise (Ho et al. 2020)."""

    def __init__(self, draw: Draw) -> None:
        self._clusters, self._width = draw.choice((3, 5, 8)), draw.uniform(0.05, 0.2)
        self._network = Perceptron.drawn(draw, 5, 2, widths=(24, 48))
        self.collect(draw)

    def init(self, seed: int) -> Tensors:
        return self._network.init(seed)

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        return (self._network(parameters, batch[0]) - batch[1]).square().mean(dim=-1)

    def samples(self, generator: torch.Generator, count: int, part: str) -> list[torch.Tensor]:
        angle = 2 * math.pi / self._clusters * torch.randint(0, self._clusters, (count,), generator=generator)
        points = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
        points = points + self._width * torch.randn(count, 2, generator=generator)
        level = torch.rand(count, 1, generator=generator) * math.pi / 2
        noise = torch.randn(count, 2, generator=generator)
        seen = level.cos() * points + level.sin() * noise
        return [torch.cat([seen, level, level.cos(), level.sin()], dim=1), noise]


register(TaskFamily("autoencoder", Autoencoder))
register(TaskFamily("factorization", Factorization))
register(TaskFamily("denoiser", Denoiser))
