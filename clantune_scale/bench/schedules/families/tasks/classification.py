"""Classification: clusters, balanced or not; spirals; convex logistic regression; rare clicks on categories."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from clantune_scale.bench.batched.model import Knobs, Tensors
from clantune_scale.bench.schedules.families.draw import Draw
from clantune_scale.bench.schedules.families.networks import Perceptron
from clantune_scale.bench.schedules.families.registry import TaskFamily, register
from clantune_scale.bench.schedules.families.task import SampledTask
from clantune_scale.bench.schedules.problems.layers import affine, cross_entropy, embed, normal_parameters


class Clusters(SampledTask):
    """Several Gaussian clusters a class.

    Args:
        draw: of sizes, noise and data.
        balanced: whether classes are equally frequent; else the k-th is 1 / k as frequent as the first.
    """

    CENTRES = 3

    def __init__(self, draw: Draw, *, balanced: bool = True) -> None:
        features, classes = draw.whole(4, 32), draw.choice((2, 4, 8, 12))
        generator = torch.Generator().manual_seed(draw.key())
        self._centres = torch.randn(classes, self.CENTRES, features, generator=generator)
        self._noise = draw.uniform(0.2, 0.9) * math.sqrt(features / 8)
        self._wrong = draw.choice((0.0, 0.0, 0.1, 0.3))
        ranks = torch.arange(1, classes + 1, dtype=torch.float32)
        self._frequencies = torch.ones(classes) if balanced else 1 / ranks**1.5
        self._network = Perceptron.drawn(draw, features, classes)
        self.collect(draw)

    def init(self, seed: int) -> Tensors:
        return self._network.init(seed)

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        return cross_entropy(self._network(parameters, batch[0]), batch[1])

    def samples(self, generator: torch.Generator, count: int, part: str) -> list[torch.Tensor]:
        labels = torch.multinomial(self._frequencies, count, replacement=True, generator=generator)
        which = torch.randint(0, self.CENTRES, (count,), generator=generator)
        centres = self._centres[labels, which]
        inputs = centres + self._noise * torch.randn(centres.shape, generator=generator)
        is_wrong = torch.rand(count, generator=generator) < self._wrong
        other = torch.randint(0, len(self._centres), (count,), generator=generator)
        return [inputs, torch.where(is_wrong, other, labels)]


class Spirals(SampledTask):
    """Two to five spiral arms in a plane, among features that say nothing."""

    def __init__(self, draw: Draw) -> None:
        self._arms, self._others = draw.choice((2, 3, 5)), draw.choice((0, 2, 8))
        self._turns, self._noise = draw.uniform(0.8, 1.6), draw.uniform(0.02, 0.1)
        self._network = Perceptron.drawn(draw, 2 + self._others, self._arms, widths=(24, 48))
        self.collect(draw)

    def init(self, seed: int) -> Tensors:
        return self._network.init(seed)

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        return cross_entropy(self._network(parameters, batch[0]), batch[1])

    def samples(self, generator: torch.Generator, count: int, part: str) -> list[torch.Tensor]:
        labels = torch.randint(0, self._arms, (count,), generator=generator)
        radius = 0.1 + 0.9 * torch.rand(count, generator=generator)
        angle = 2 * math.pi * (self._turns * radius + labels / self._arms)
        places = radius.unsqueeze(1) * torch.stack([angle.cos(), angle.sin()], dim=1)
        places = 2 * (places + self._noise * torch.randn(count, 2, generator=generator))
        return [torch.cat([places, torch.randn(count, self._others, generator=generator)], dim=1), labels]


class Logistic(SampledTask):
    """Logistic regression, convex, on ill-conditioned features; perhaps few positives, perhaps flipped labels."""

    def __init__(self, draw: Draw) -> None:
        features = draw.whole(8, 96)
        generator = torch.Generator().manual_seed(draw.key())
        self._scales = torch.logspace(0, -draw.uniform(0.0, 2.0), features)
        self._weights = torch.randn(features, generator=generator) / self._scales * 4 / math.sqrt(features)
        self._bias, self._flipped = draw.choice((0.0, 0.0, -4.0)), draw.choice((0.0, 0.05, 0.15))
        self.collect(draw)

    def init(self, seed: int) -> Tensors:
        return [torch.zeros(len(self._scales), 1), torch.zeros(1)]

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        logits = affine(batch[0], *parameters).squeeze(-1)
        return functional.binary_cross_entropy_with_logits(logits, batch[1], reduction="none")

    def samples(self, generator: torch.Generator, count: int, part: str) -> list[torch.Tensor]:
        inputs = self._scales * torch.randn(count, len(self._scales), generator=generator)
        chance = torch.sigmoid(inputs @ self._weights + self._bias)
        chance = chance * (1 - 2 * self._flipped) + self._flipped
        return [inputs, (torch.rand(count, generator=generator) < chance).float()]


class Clicks(SampledTask):
    """Rare events from categories: embeddings of a few fields, most of whose values are seldom seen."""

    FIELDS = 3

    def __init__(self, draw: Draw) -> None:
        values, width = draw.whole(30, 120), draw.choice((4, 8))
        self._frequencies = 1 / torch.arange(1, values + 1, dtype=torch.float32)
        generator = torch.Generator().manual_seed(draw.key())
        self._tastes = torch.randn(self.FIELDS, values, 4, generator=generator)
        self._bias, self._width = draw.choice((-1.0, -2.5)), width
        self._network = Perceptron((self.FIELDS * width, draw.whole(12, 32), 1), "relu")
        self.collect(draw)

    def init(self, seed: int) -> Tensors:
        tables = [((len(self._frequencies), self._width), 0.3)] * self.FIELDS
        return normal_parameters(seed, [*tables, *self._network.shapes()])

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        fields = [embed(parameters[field], batch[0][..., field]) for field in range(self.FIELDS)]
        logits = self._network(parameters[self.FIELDS :], torch.cat(fields, dim=-1)).squeeze(-1)
        return functional.binary_cross_entropy_with_logits(logits, batch[1], reduction="none")

    def samples(self, generator: torch.Generator, count: int, part: str) -> list[torch.Tensor]:
        drawn = torch.multinomial(self._frequencies, count * self.FIELDS, replacement=True, generator=generator)
        values = drawn.view(count, self.FIELDS)
        tastes = [self._tastes[field, values[:, field]] for field in range(self.FIELDS)]
        logits = (tastes[0] * tastes[1]).sum(dim=1) + tastes[2][:, 0] + self._bias
        return [values, (torch.rand(count, generator=generator) < torch.sigmoid(logits)).float()]


register(TaskFamily("clusters", Clusters))
register(TaskFamily("unbalanced clusters", lambda draw: Clusters(draw, balanced=False)))
register(TaskFamily("spirals", Spirals))
register(TaskFamily("logistic", Logistic))
register(TaskFamily("clicks", Clicks))
