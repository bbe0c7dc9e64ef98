"""Whole runs in which the guard decides: plateaus, warm-ups, losses that rise first, drifting data, a real blow-up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from clantune_scale.bench.batched import BatchedClans, Settings
from clantune_scale.bench.schedules import curves
from clantune_scale.core.genome import Gene
from clantune_scale.core.strategies import RunFacts, build

LR = Gene("lr", bounds=(1e-3, 1e3), relative=True)
STEPS, SEEDS = 400, (0, 1, 2)


@dataclass
class Toy:
    """A model of a few weights.

    Attributes:
        start: [size] initial weights.
        loss: weights [models, 1, size] and a batch to [models, samples].
        sample: (generator, samples, step) to tensors [samples, ...]; step is None for the validation window.
    """

    start: torch.Tensor
    loss: Callable[..., torch.Tensor]
    sample: Callable[..., list[torch.Tensor]]
    batch_size: int = 8
    group_of: tuple[str, ...] = ()
    validation: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.validation = self.sample(torch.Generator().manual_seed(99), 64, None)

    def init(self, seed: int) -> list[torch.Tensor]:
        return [self.start.clone()]

    def batch(self, seed: int, step: int, part: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(1 + seed + 1000 * step + 100_000_000 * part)
        return self.sample(generator, self.batch_size, step)

    def losses(self, parameters, batch, knobs) -> torch.Tensor:
        return self.loss(parameters[0].unsqueeze(1), *batch)


def normal(generator: torch.Generator, samples: int, step: int | None, *, size: int = 1, spread: float = 1.0):
    return [spread * torch.randn(samples, size, generator=generator)]


def run(toy: Toy, settings: Settings, *, strategy: str = "clan") -> BatchedClans:
    """Clans of four, one a seed."""
    facts = RunFacts(4, (LR,), 5, round_length_steps=8, duty_cycle=0.1, total_steps=STEPS, sees_samples_once=True)
    count = len(SEEDS)
    clans = BatchedClans(toy, strategies=[build(strategy, facts)] * count, settings=[settings] * count, seeds=SEEDS)
    clans.run(STEPS)
    return clans


def rollbacks(clans: BatchedClans) -> list[int]:
    return [sum(record.restored for record in clan.lineage) for clan in clans.clans]


def final(clans: BatchedClans) -> list[float]:
    return [float(fitness.mean.min()) for fitness in clans.evaluate()]


def rates(clans: BatchedClans) -> list[float]:
    """Of each clan's centre, in configured ones."""
    return [math.exp(clan.population.memory["centre"]["lr"]) for clan in clans.clans]


def test_a_plateau_is_no_lost_ground():
    """The product of three weights should be 1, and near 0 its gradient is next to nothing. Sixteen others are right
    from the start, and wander off with the noise, so that the loss rises a little until the product is found."""

    def loss(weights: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        product = 0.5 * (weights[..., :3].prod(dim=-1) - 1).square()
        return product + 2.0 * (weights[..., 3:] - noise).square().mean(dim=-1)

    toy = Toy(torch.tensor([0.1] * 3 + [0.0] * 16), loss, lambda *which: normal(*which, size=16))
    clans = run(toy, Settings("sgd", lr=0.1))
    assert rollbacks(clans) == [0, 0, 0]
    assert max(final(clans)) < 2.1  # of 2.5; where the product is found, 2.0


@pytest.mark.parametrize("constant", [0.0, -100.0], ids=["above 0", "a likelihood's"])
def test_training_goes_on_from_a_trained_model_through_a_warm_up(constant):
    """The start is as good as training ever was, so that the first rounds can only be worse."""
    toy = Toy(
        torch.full((32,), 0.03),
        lambda weights, noise: constant + 0.5 * (weights - noise).square().mean(dim=-1),
        lambda *which: normal(*which, size=32),
    )
    settings = Settings("sgd", lr=0.8, schedule=curves.over("warmup-cosine", STEPS))
    clans = run(toy, settings)
    assert max(rollbacks(clans)) <= 2
    assert min(rates(clans)) > 0.7 / 9 / 3


def shortcut(generator: torch.Generator, samples: int, step: int | None) -> list[torch.Tensor]:
    """A quiet feature is the label; a loud one is it in training, nine times in ten, and seldom in validation."""
    label = torch.randint(0, 2, (samples,), generator=generator).float() * 2 - 1
    is_told = torch.rand(samples, generator=generator) < (0.2 if step is None else 0.9)
    loud = torch.where(is_told, label, -label)
    return [torch.stack([2.0 * loud, 0.4 * label], dim=-1), label]


def test_a_validation_loss_may_rise_before_it_falls():
    toy = Toy(
        torch.zeros(2),
        lambda weights, features, label: (weights @ features.mT).squeeze(-2).sub(label).square(),
        shortcut,
        batch_size=64,
    )
    settings = Settings("sgd", lr=0.01)
    clans, plain = run(toy, settings), run(toy, settings, strategy="control")
    initial = 1.0
    assert all(min(record.losses) > initial for record in list(plain.clans[0].lineage)[:4])
    assert rollbacks(clans) == [0, 0, 0]
    assert final(clans) < final(plain)


def test_what_no_lower_rate_mends_costs_two_rollbacks_at_most():
    """The target runs away faster than anybody follows: training and validation both rise."""

    def away(generator: torch.Generator, samples: int, step: int | None) -> list[torch.Tensor]:
        (target,) = normal(generator, samples, step, size=8, spread=0.3)
        return [target if step is None else target + 0.05 * (1 + step)]

    toy = Toy(torch.zeros(8), lambda weights, target: 0.5 * (weights - target).square().mean(dim=-1), away)
    assert max(rollbacks(run(toy, Settings("sgd", lr=0.02)))) <= 2


@pytest.mark.parametrize("constant", [0.0, -100.0], ids=["above 0", "a likelihood's"])
@pytest.mark.parametrize("times", [100.0, 300.0])
def test_a_rate_beyond_stability_is_rolled_back_and_the_run_recovers(times, constant):
    curvature = torch.logspace(0, -1.5, 16)
    toy = Toy(
        torch.ones(16),
        lambda weights, noise: constant + 0.5 * ((weights - noise).square() @ curvature),
        lambda *which: normal(*which, size=16, spread=0.1),
    )
    clans = run(toy, Settings("sgd", lr=0.2 * times, hyper={"momentum": 0.0}))
    initial = constant + 0.5 * float(curvature.sum())
    assert min(rollbacks(clans)) >= 1
    assert max(final(clans)) < initial - 0.8 * (initial - constant)
