"""Families as a third party would bring them; importing this module registers them."""

from __future__ import annotations

import torch

from clantune_scale.bench.batched import Momentum
from clantune_scale.bench.schedules.families.draw import Draw
from clantune_scale.bench.schedules.families.registry import OptimizerFamily, ScheduleFamily, TaskFamily, register
from clantune_scale.bench.schedules.families.task import Task
from clantune_scale.bench.schedules.problem import stream

CURVATURE = torch.logspace(0, -1.5, 6)


class Bowl(Task):
    """A noisy quadratic in six dimensions."""

    batch_size = 8

    def __init__(self, draw: Draw) -> None:
        self._noise = draw.uniform(0.1, 0.4)
        self.validation, self.test = [torch.zeros(16, 6)], [torch.zeros(4, 6)]

    def init(self, seed: int) -> list[torch.Tensor]:
        return [torch.ones(6)]

    def batch(self, seed: int, step: int, part: int) -> list[torch.Tensor]:
        return [self._noise * torch.randn(8, 6, generator=stream(0, seed, step, part))]

    def losses(self, parameters, batch, knobs) -> torch.Tensor:
        return 0.5 * ((parameters[0].unsqueeze(1) - batch[0]).square() @ CURVATURE)


class Steady(Momentum):
    """Momentum by another name."""


register(TaskFamily("test bowl", Bowl, steps=(60, 80), side="tuning"))
register(
    OptimizerFamily(
        "test steady",
        "test-steady",
        (-2.0, 1.0),
        weight_decays=(1e-3,),
        momentum="momentum",
        rule=Steady(),
        side="tuning",
    )
)
register(
    ScheduleFamily("test stairs", lambda share: 0.5 ** int(4 * share), warmups=(0.0, 0.1), floors=(0.0,), side="tuning")
)
