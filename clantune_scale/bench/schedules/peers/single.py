"""One plain run by an optimizer of torch's kind, on the data, steps and losses of everything else in the table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clantune_scale.bench.batched import Settings
from clantune_scale.bench.schedules.peers.optimizers import OptimizerPeer
from clantune_scale.bench.schedules.problem import Problem

#: Points of a run at which its learning rate is noted.
_POINTS = 60


@dataclass(frozen=True)
class SingleRun:
    """What came of a run.

    Attributes:
        loss: on the test data; infinite if it is not a number.
        num_trained: samples whose gradient was computed.
        rates: (step, learning rate in effect).
    """

    loss: float
    num_trained: int
    rates: tuple[tuple[int, float], ...]


def run_single(peer: OptimizerPeer, problem: Problem, settings: Settings, seed: int) -> SingleRun:
    """Trains one model from ``problem.init(seed)`` for ``problem.total_steps`` steps on the whole batch.

    Args:
        peer: whose optimizer.
        problem: what it trains.
        settings: with the start's learning rate and schedule; its clip, micro-batches and knobs hold here too.
        seed: of weights and data.
    """
    parameters = [parameter.clone().requires_grad_() for parameter in problem.init(seed)]
    setup = peer.setup(parameters, settings, problem)
    knobs = {name: torch.tensor([value]) for name, value in settings.knobs.items()}
    group, num_trained, rates = setup.optimizer.param_groups[0], 0, []
    base, stride = group["lr"], max(1, problem.total_steps // _POINTS)
    for step in range(problem.total_steps):
        if setup.factor is not None:
            group["lr"] = base * setup.factor(step)
        batch = _batch(problem, settings, seed, step)
        loss = problem.losses([p.unsqueeze(0) for p in parameters], batch, knobs).mean()
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        if settings.clip > 0:
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        setup.optimizer.step()
        num_trained += batch[0].shape[1]
        if step % stride == 0:
            rates.append((step, rate_in_effect(group)))
    setup.evaluates()
    return SingleRun(_test_loss(problem, parameters), num_trained, tuple(rates))


def rate_in_effect(group: dict) -> float:
    """The learning rate of a parameter group, with what the packages keep beside ``lr``.

    ``scheduled_lr`` is schedule-free's with its warm-up; ``d`` the estimate of Prodigy and D-Adaptation, which
    D-Adaptation's SGD divides by the norm of the first gradient.
    """
    return group.get("scheduled_lr", group["lr"]) * group.get("d", 1.0) / group.get("g0_norm", 1.0)


def _batch(problem: Problem, settings: Settings, seed: int, step: int) -> list[torch.Tensor]:
    """Tensors [1, samples, ...]."""
    parts = [problem.batch(seed, step, part) for part in range(settings.num_micro_batches)]
    return [torch.cat(columns).unsqueeze(0) for columns in zip(*parts, strict=True)]


@torch.no_grad()
def _test_loss(problem: Problem, parameters: Sequence[torch.Tensor]) -> float:
    examples = [column.unsqueeze(0) for column in problem.test]
    loss = float(problem.losses([p.unsqueeze(0) for p in parameters], examples, {}).mean())
    return loss if math.isfinite(loss) else math.inf
