"""Regression on a teacher network's noisy outputs, for inputs whose features differ in scale by ten."""

from __future__ import annotations

import math

import torch

from clantune_scale.bench.batched import Settings
from clantune_scale.bench.batched.model import Knobs, Tensors
from clantune_scale.bench.schedules.problem import Grid, Problem, quarter_decades, stream
from clantune_scale.bench.schedules.problems.layers import affine, normal_parameters

FEATURES, TEACHER, WIDTH = 16, 24, 32
NOISE = 0.5


class Regression(Problem):
    """A student of two hidden layers, squared error.

    Args:
        optimizer: ``"adamw"`` or ``"sgd"``.
    """

    def __init__(self, optimizer: str) -> None:
        self.name = f"regression-{optimizer}"
        is_adam = optimizer == "adamw"
        decay = 0.05 if is_adam else 1e-4
        self.settings = Settings(optimizer, weight_decay=decay)
        decays = (0.0, decay, 8 * decay) if is_adam else (0.0, decay)
        self.grid = Grid(quarter_decades(-4.0 if is_adam else -3.25), weight_decays=decays)
        generator = torch.Generator().manual_seed(11)
        self._teacher = [
            torch.randn(FEATURES, TEACHER, generator=generator) * 1.5 / math.sqrt(FEATURES),
            torch.randn(TEACHER, generator=generator) * 1.5 / math.sqrt(TEACHER),
        ]
        self._scales = 1.5 * torch.logspace(0, -1, FEATURES)
        self.validation = self._samples(generator, 256, NOISE)
        self.test = self._samples(generator, 2048, 0.0)

    def init(self, seed: int) -> Tensors:
        shapes = [
            ((FEATURES, WIDTH), FEATURES**-0.5),
            ((WIDTH,), 0.0),
            ((WIDTH, WIDTH), WIDTH**-0.5),
            ((WIDTH,), 0.0),
            ((WIDTH, 1), WIDTH**-0.5),
            ((1,), 0.0),
        ]
        return normal_parameters(seed, shapes)

    def batch(self, seed: int, step: int, part: int) -> Tensors:
        return self._samples(stream(2, seed, step, part), self.batch_size, NOISE)

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        hidden = torch.tanh(affine(batch[0], *parameters[0:2]))
        hidden = torch.tanh(affine(hidden, *parameters[2:4]))
        return (affine(hidden, *parameters[4:6]).squeeze(-1) - batch[1]).square()

    def _samples(self, generator: torch.Generator, count: int, noise: float) -> list[torch.Tensor]:
        inputs = self._scales * torch.randn(count, FEATURES, generator=generator)
        outputs = torch.tanh(inputs @ self._teacher[0]) @ self._teacher[1]
        return [inputs, outputs + noise * torch.randn(count, generator=generator)]
