"""A quadratic with curvatures over three decades and a noisy gradient: the simplest problem that needs a schedule."""

from __future__ import annotations

import math

import torch

from clantune_scale.bench.batched import Settings
from clantune_scale.bench.batched.model import Knobs, Tensors
from clantune_scale.bench.schedules.problem import Grid, Problem, quarter_decades, stream

WIDTH = 128


class Quadratic(Problem):
    """Loss 1/2 (theta - c)^T H (theta - c) - const, where c is a sample of unit variance around 0."""

    name = "quadratic-sgd"
    settings = Settings("sgd", weight_decay=1e-4)
    grid = Grid(quarter_decades(-3.25), weight_decays=(0.0, 1e-4, 8e-4))

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        curvature = torch.exp(torch.linspace(math.log(1e-3), 0.0, WIDTH))
        self._curvature = curvature[torch.randperm(WIDTH, generator=generator)]
        self.validation = [torch.randn(256, WIDTH, generator=generator)]
        self.test = [torch.zeros(1, WIDTH)]  # the expectation, but for the constant

    def init(self, seed: int) -> Tensors:
        return [torch.randn(WIDTH, generator=torch.Generator().manual_seed(1000 + seed))]

    def batch(self, seed: int, step: int, part: int) -> Tensors:
        return [torch.randn(self.batch_size, WIDTH, generator=stream(1, seed, step, part))]

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        distance = parameters[0].unsqueeze(1) - batch[0]
        return 0.5 * (distance.square() @ self._curvature)
