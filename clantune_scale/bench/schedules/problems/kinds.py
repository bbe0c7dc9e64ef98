"""Further kinds of scheduling problems, each a few lines on top of the study's tasks."""

from __future__ import annotations

from dataclasses import replace

import torch

from clantune_scale.bench.batched.model import Knobs, Tensors
from clantune_scale.bench.schedules.problem import STARTS, Problem, Start, stream
from clantune_scale.bench.schedules.problems.digits import PIXELS, WIDTH, DigitsPerceptron
from clantune_scale.bench.schedules.problems.layers import affine, cross_entropy

#: Starts of problems that have another base schedule, length or data than the task that they derive from.
_FEW = (STARTS[0], STARTS[2], STARTS[4])


def scheduled(problem: Problem, schedule: str) -> Problem:
    """A user who has a schedule already, at a rate that may be wrong."""
    return problem.variant(f"{problem.name}, {schedule}", schedule=schedule, starts=_FEW)


def longer(problem: Problem, times: int) -> Problem:
    return problem.variant(f"{problem.name}, {times} x longer", total_steps=times * problem.total_steps, starts=_FEW)


def endless(problem: Problem) -> Problem:
    """Nobody says how long the run will be."""
    return problem.variant(f"{problem.name}, unknown length", knows_length=False, starts=_FEW)


def accumulated(problem: Problem, times: float) -> Problem:
    """Accumulation that is too small, or too large: a batch of ``times`` the task's, with the rates that belong to it.

    The run keeps it. At equal steps more is never worse and costs what it is, so that there is nothing to find but
    those rates (the benchmark's log, 13).
    """
    batch_size = round(times * problem.batch_size)
    return problem.variant(f"{problem.name}, batch {batch_size}", batch_size=batch_size, starts=_FEW)


def far_too_small(problem: Problem, total_steps: int) -> Problem:
    """A longer run from rates so small that the clan has to climb for long, and may climb too far."""
    starts = (Start("0.1x", 0.1), Start("0.03x", 0.03))
    return problem.variant(f"{problem.name}, {total_steps} steps", total_steps=total_steps, starts=starts)


def wrong_weight_decay(problem: Problem) -> Problem:
    decay = problem.settings.weight_decay
    starts = tuple(
        Start(f"{rate:g}x, wd {times:g}x", rate, {"weight_decay": times * decay})
        for rate, times in ((0.32, 0.0), (1.0, 30.0), (0.32, 30.0))
    )
    return problem.variant(f"{problem.name}, wrong weight decay", starts=starts, extra_genes=("weight_decay",))


def wrong_momentum(problem: Problem) -> Problem:
    """Momentum, or Adam's first beta, forgets too soon or too late."""
    gene = "beta1" if problem.settings.optimizer == "adamw" else "momentum"
    starts = tuple(
        Start(f"{rate:g}x, {gene} {value:g}", rate, {"hyper": {**problem.settings.hyper, gene: value}})
        for rate, value in ((0.32, 0.5), (1.0, 0.5), (1.0, 0.98))
    )
    return problem.variant(f"{problem.name}, wrong {gene}", starts=starts, extra_genes=(gene,))


def wrong_clip(problem: Problem) -> Problem:
    """Gradients clipped so short that every step has the same length, from which only the learning rate follows."""
    starts = tuple(Start(f"{rate:g}x, clip 0.1", rate, {"clip": 0.1}) for rate in (0.32, 1.0, 3.2))
    return problem.variant(f"{problem.name}, wrong clip", starts=starts, extra_genes=("clip",))


class NoisyLabels(DigitsPerceptron):
    """Three labels in ten are drawn at random."""

    SHARE = 0.3

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        self.name, self.starts = f"{self.name}, label noise", _FEW

    def batch(self, seed: int, step: int, part: int) -> Tensors:
        pixels, labels = super().batch(seed, step, part)
        generator = stream(5, seed, step, part)
        is_noise = torch.rand(labels.shape, generator=generator) < self.SHARE
        return [pixels, torch.where(is_noise, torch.randint(0, 10, labels.shape, generator=generator), labels)]


class Shift(DigitsPerceptron):
    """Images lie on their side in the second half of the run; half of what validation and test hold do."""

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        self.name, self.starts = f"{self.name}, shift", _FEW
        self.validation, self.test = (self._half_turned(*part) for part in (self.validation, self.test))

    def batch(self, seed: int, step: int, part: int) -> Tensors:
        pixels, labels = super().batch(seed, step, part)
        return [_turned(pixels) if step >= self.total_steps // 2 else pixels, labels]

    def _half_turned(self, pixels: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
        return [torch.cat([_turned(pixels[0::2]), pixels[1::2]]), torch.cat([labels[0::2], labels[1::2]])]


class Dropout(DigitsPerceptron):
    """Few images and a hidden layer with dropout, that should be there (and starts at none) or not so much."""

    TRAIN, RIGHT = 100, 0.2

    def __init__(self, optimizer: str) -> None:
        super().__init__(optimizer)
        self.name, self.extra_genes, self.num_samples = f"{self.name}, dropout", ("dropout",), self.TRAIN
        self._pixels, self._labels = self._pixels[: self.TRAIN], self._labels[: self.TRAIN]
        self.settings = replace(self.settings, knobs={"dropout": self.RIGHT})
        self.starts = tuple(
            Start(f"{rate:g}x, dropout {value:g}", rate, {"knobs": {"dropout": value}})
            for rate, value in ((1.0, 0.0), (1.0, 0.5), (0.32, 0.0))
        )

    def batch(self, seed: int, step: int, part: int) -> Tensors:
        """The masks come with the samples, as numbers that are compared with the rate."""
        generator = stream(6, seed, step, part)
        chosen = torch.randint(0, self.TRAIN, (self.batch_size,), generator=generator)
        noise = 0.3 * torch.randn(self.batch_size, PIXELS, generator=generator)
        masks = torch.rand(self.batch_size, WIDTH, generator=generator)
        return [self._pixels[chosen] + noise, self._labels[chosen], masks]

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        hidden = torch.relu(affine(batch[0], *parameters[0:2]))
        if len(batch) == 3 and "dropout" in knobs:
            rate = knobs["dropout"].view(-1, 1, 1)
            hidden = hidden * (batch[2] >= rate) / (1 - rate)
        return cross_entropy(affine(hidden, *parameters[2:4]), batch[1])


def _turned(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.view(-1, 8, 8).mT.reshape(-1, PIXELS)
