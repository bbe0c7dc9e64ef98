from __future__ import annotations

import math

import numpy as np
import pytest

from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Gene
from clantune_scale.core.strategies import RunFacts, build

NAME = "clantune_scale.bench.schedules.variants:ClanVariant"
FACTS = RunFacts(8, (Gene("lr", relative=True),), 3, 20, duty_cycle=0.1, total_steps=10_000)


def moves(*landscapes, name: str = NAME, batch_noise: float = 0.0, **options) -> list[float]:
    """The moves of one round per landscape (log lr to loss), measured on 16 batches with noise of their own."""
    rng = np.random.default_rng(0)
    strategy = build(name, FACTS, options)
    population = strategy.init(Fitness.from_losses(np.full((8, 16), 100.0)))
    step, changes = 0, []
    for index, loss_of in enumerate(landscapes):
        plan = strategy.plan(index, step)
        losses = np.array([[loss_of(math.log(own.values["lr"]))] for own in population.genomes])
        fitness = Fitness.from_losses(losses + batch_noise * rng.standard_normal((8, 16)))
        population = strategy.evolve(population, plan, fitness).population
        changes.append(population.memory["moves"]["lr"]["change"])
        step = plan.end_step
    return changes


def bowl(x: float) -> float:
    return (x - 0.3) ** 2


def uphill(x: float) -> float:
    return 50 + x


def downhill(x: float) -> float:
    return 50 - x


def test_the_nearer_minimum_with_one_standard_error_is_clan():
    """So that what was measured with the variant holds for the default that it became."""
    rounds = [bowl, downhill, bowl, uphill]
    ours = moves(*rounds, batch_noise=0.05, model="nearer", noise=1.0)
    assert ours == pytest.approx(
        moves(*rounds, batch_noise=0.05, name="clan", trial_cost=0.0, start_factor=1.0, prior=1.0), rel=1e-6
    )
    assert moves(bowl)[0] == pytest.approx(0.3)


def test_a_line_is_quadratic_in_the_rate_itself():
    def along(x: float) -> float:
        return (math.exp(x) - 1.5) ** 2

    assert moves(along, model="line")[0] == pytest.approx(math.log(1.5), abs=0.03)  # third order in the spread
    assert abs(moves(along)[0] - math.log(1.5)) > 0.1


def test_the_nearer_minimum_is_the_lines_upward_and_the_parabolas_downward():
    up, down = (lambda x: 50 + (x - 0.4) ** 2), (lambda x: 50 + (x + 0.2) ** 2)
    assert moves(up, model="nearer") == moves(up, model="line") != moves(up)
    assert moves(down, model="nearer") == pytest.approx([-0.2])
    assert moves(down, model="line")[0] < -0.21


def test_a_slope_that_noise_hides_moves_little():
    rounds = [lambda x: 50 - 1e-3 * x] * 12
    free, gated = (np.abs(moves(*rounds, batch_noise=0.3, noise=noise)) for noise in (0.0, 2.0))
    assert gated.mean() < 0.5 * free.mean()
    assert moves(*[lambda x: 50 - x] * 2, batch_noise=1e-4, noise=2.0) == [0.8, 0.8]  # one that it does not


def test_the_trusted_change_shrinks_after_a_turn_and_grows_back():
    assert moves(downhill, uphill, downhill, downhill, trusts=True) == pytest.approx([0.8, -0.8, 0.4, 0.2])
    assert moves(downhill, uphill, uphill, uphill, trusts=True)[-1] == pytest.approx(-0.52)


def test_a_share_of_the_last_change_goes_into_the_next():
    assert moves(downhill, uphill, uphill, smoothing=0.25) == pytest.approx([0.8, -0.4, -0.7])


def test_climbing_may_be_slower_than_falling_or_falling_than_climbing():
    assert moves(downhill, uphill, max_up=0.2) == pytest.approx([0.2, -0.8])
    assert moves(downhill, uphill, max_down=0.2) == pytest.approx([0.8, -0.2])


@pytest.mark.parametrize(("churn", "num_kept"), [(1.0, 1), (0.5, 4), (0.25, 6), (0.0, 8)])
def test_churn_is_the_share_of_the_clan_that_takes_the_fittest_ones_state(churn, num_kept):
    strategy = build(NAME, FACTS, {"churn": churn})
    population = strategy.init(Fitness.from_losses(np.full((8, 16), 100.0)))
    losses = np.arange(8.0)[:, None] + np.linspace(50, 51, 16)
    donors = strategy.evolve(population, strategy.plan(0, 0), Fitness.from_losses(losses)).donors
    assert sum(donor == member for member, donor in enumerate(donors)) == num_kept
    assert donors[:num_kept] == tuple(range(num_kept))  # the fitter ones
    assert set(donors[num_kept:]) <= {0}
