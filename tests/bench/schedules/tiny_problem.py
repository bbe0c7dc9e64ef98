"""A scheduling problem that trains in milliseconds, as a third party would bring it."""

from __future__ import annotations

import torch

from clantune_scale.bench.batched import Settings
from clantune_scale.bench.schedules.problem import Grid, Problem, Start, stream

CURVATURE = torch.logspace(0, -1.5, 8)


class Tiny(Problem):
    """A noisy quadratic in eight dimensions."""

    name = "tiny"
    total_steps = 40
    batch_size = 8
    settings = Settings("sgd", hyper={"momentum": 0.0})
    grid = Grid((0.03, 0.1, 0.3, 1.0, 3.0), ("constant", "linear"))
    starts = (Start("0.1x", 0.1), Start("10x", 10.0))

    def __init__(self) -> None:
        self.validation = [torch.zeros(16, 8)]
        self.test = [torch.zeros(4, 8)]

    def init(self, seed: int) -> list[torch.Tensor]:
        return [torch.ones(8)]

    def batch(self, seed: int, step: int, part: int) -> list[torch.Tensor]:
        return [0.3 * torch.randn(8, 8, generator=stream(0, seed, step, part))]

    def losses(self, parameters, batch, knobs) -> torch.Tensor:
        return 0.5 * ((parameters[0].unsqueeze(1) - batch[0]).square() @ CURVATURE)


TINY = Tiny()
BOTH = [TINY, TINY.variant("tiny, longer", total_steps=60)]
