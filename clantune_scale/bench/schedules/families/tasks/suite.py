"""The benchmark's own tasks as one family; they were tuned on, so that they stay on the tuning side."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from clantune_scale.bench.batched.model import Knobs, Tensors
from clantune_scale.bench.schedules.families.draw import Draw
from clantune_scale.bench.schedules.families.registry import TaskFamily, register
from clantune_scale.bench.schedules.families.task import Task
from clantune_scale.bench.schedules.problem import Problem
from clantune_scale.bench.schedules.problems.bytes import BytesPerceptron
from clantune_scale.bench.schedules.problems.digits import DigitsConvolution, DigitsPerceptron
from clantune_scale.bench.schedules.problems.quadratic import Quadratic
from clantune_scale.bench.schedules.problems.regression import Regression

OWN: tuple[Callable[[], Problem], ...] = (
    Quadratic,
    partial(Regression, "adamw"),
    partial(DigitsPerceptron, "adamw"),
    partial(BytesPerceptron, "adamw"),
    partial(DigitsConvolution, "adamw"),
)


class Own(Task):
    """One of them, whatever optimizer the benchmark has it with."""

    def __init__(self, draw: Draw) -> None:
        self._problem = draw.choice(OWN)()
        self.batch_size, self.num_samples = self._problem.batch_size, self._problem.num_samples
        self.validation, self.test = self._problem.validation, self._problem.test

    def init(self, seed: int) -> Tensors:
        return self._problem.init(seed)

    def batch(self, seed: int, step: int, part: int) -> Tensors:
        return self._problem.batch(seed, step, part)

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        return self._problem.losses(parameters, batch, knobs)


register(TaskFamily("suite", Own, steps=(300, 2000), side="tuning"))
