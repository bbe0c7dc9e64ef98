from __future__ import annotations

import math

import numpy as np
import pytest

from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.rounds import Phase, PhaseKind
from clantune_scale.core.strategies import Population, build
from clantune_scale.core.strategies.pbt import explored, is_better, perturbed, truncation, ttest
from clantune_scale.errors import EvaluationError
from tests.core.strategies.facts import DROPOUT, LR, facts, fitness_of

FACTORS = (1.2, 0.8)
LATER = np.array([[0.0], [1.0]])
BETA = Gene("beta1", scale="logit", bounds=(0.5, 0.99), initial=0.9)
WHOLE = Gene("accumulation", kind="specialized", bounds=(1, 8), integer=True)


def test_a_round_is_one_competition_on_the_whole_batch_that_is_kept():
    plan = build("pbt", facts(genes=(LR, DROPOUT))).plan(2, 40)
    assert plan.phases == (Phase(PhaseKind.COMPETITIVE, 20, keeps=True, batch_factor=4),)
    assert (plan.explores, plan.uses_ema, plan.evolves) == (("lr", "dropout"), False, True)
    assert build("pbt", facts(), {"full_batch": False}).plan(0, 0).phases[0].batch_factor == 1
    assert not build("pbt", facts()).plan(49, 980).evolves  # what was copied at the end would be trained no more


@pytest.mark.parametrize(
    ("losses", "weakest", "strongest"),
    [
        ([4.0, 1.0, 3.0, 2.0], {0}, {1}),  # ceil(4 x 0.25) = 1
        ([5.0, 1.0, 3.0, 2.0, 4.0], {0, 4}, {1, 3}),  # ceil(5 x 0.25) = 2
        ([1.0, 2.0], {1}, {0}),
        ([3.0, math.nan, 1.0, 2.0, math.inf], {0, 1, 4}, {2}),  # ceil(3 x 0.25) = 1 of the finite, and the others
        ([math.nan, 1.0], {0}, {1}),
    ],
)
def test_truncation_takes_ray_tunes_quantiles_and_whoever_is_not_finite(losses, weakest, strongest):
    seen = set()
    for seed in range(20):
        donors = truncation(fitness_of(losses), 0.25, seed, 3)
        assert {member for member, donor in enumerate(donors) if donor != member} == weakest
        seen |= {donors[member] for member in weakest}
    assert seen == strongest


def test_quantiles_never_overlap_and_a_clan_of_one_goes_on():
    assert sorted(truncation(fitness_of([1.0, 3.0, 2.0]), 0.5, 0, 0)) == [0, 0, 2]  # ceil(1.5) = 2 > 3 / 2
    assert truncation(fitness_of([1.0]), 0.25, 0, 0) == (0,)
    assert ttest(fitness_of([1.0]), 0.05, 0, 0) == (0,)


def test_welchs_test_by_hand():
    # Means 1 and 2, variances 0.5 and 2 over 4 batches each: t = -1 / sqrt(0.5 / 4 + 2 / 4) = -1.2649. By Welch and
    # Satterthwaite, 0.625^2 / ((0.125^2 + 0.5^2) / 3) = 4.412 degrees of freedom, and the density beyond |t|
    # integrates to 0.2686.
    unit = np.array([-1.0, -1.0, 1.0, 1.0]) * math.sqrt(3 / 4)
    fitness = Fitness.from_losses(np.stack([1 + math.sqrt(0.5) * unit, 2 + math.sqrt(2.0) * unit]))
    assert is_better(fitness, 0, 1, 0.2687) and not is_better(fitness, 0, 1, 0.2685)
    assert not is_better(fitness, 1, 0, 0.9999)


def test_without_spread_a_difference_is_certain_and_one_batch_shows_nothing():
    assert is_better(Fitness.from_losses([[1.0, 1.0], [2.0, 2.0]]), 0, 1, 1e-9)
    assert not is_better(Fitness.from_losses([[1.0, 1.0], [1.0, 1.0]]), 0, 1, 0.999)
    assert not is_better(Fitness.from_losses([[1.0], [2.0]]), 0, 1, 0.999)


def test_the_t_test_copies_better_members_alone_and_what_those_got():
    rng = np.random.default_rng(0)
    fitness = Fitness.from_losses(np.arange(6.0)[:, None] + 0.1 * rng.standard_normal((6, 8)))
    copied = set()
    for seed in range(60):
        donors = ttest(fitness, 0.05, seed, 0)
        assert all(donor <= member for member, donor in enumerate(donors))
        assert all(donors[donor] == donor for donor in donors)
        copied |= {(member, donor) for member, donor in enumerate(donors) if donor != member}
    # Each of these is met, and met as one that copies nobody, with probability 1/5 x 4/5 at least: a right rule
    # misses one of them in 60 seeds with probability 5 x 0.84^60 < 0.001.
    assert {(1, 0), (2, 0), (5, 0), (2, 1), (5, 1)} <= copied


@pytest.mark.parametrize("better", [0, 1])
def test_nobody_meets_itself(better):
    fitness = Fitness.from_losses([[1.0, 1.1, 0.9] if member == better else [9.0, 9.1, 8.9] for member in range(2)])
    assert all(ttest(fitness, 0.05, seed, 0) == (better, better) for seed in range(20))


def test_the_t_test_seldom_copies_among_equals_and_mostly_where_members_differ():
    """Size and power, over 2000 meetings each, of 16 batches: standard errors are about 0.004 and 0.01."""
    rng = np.random.default_rng(1)
    pairs = [Fitness.from_losses(rng.standard_normal((2, 16))) for _ in range(2000)]
    false = np.mean([is_better(pair, 0, 1, 0.05) for pair in pairs])
    assert false == pytest.approx(0.025, abs=0.012)  # two-sided 0.05, of which half is in this direction
    # A difference of one standard deviation is found by a t-test with 30 degrees of freedom 78 times of 100.
    found = np.mean([is_better(Fitness.from_losses(pair.losses + LATER), 0, 1, 0.05) for pair in pairs])
    assert found == pytest.approx(0.78, abs=0.03)


@pytest.mark.parametrize("exploit", ["truncation", "ttest"])
def test_a_member_that_is_not_finite_always_copies_one_that_is(exploit):
    pbt = build("pbt", facts(), {"exploit": exploit})
    population = pbt.init(fitness_of([3.0] * 4))
    for index in range(20):
        donors = pbt.evolve(population, pbt.plan(index, 20 * index), fitness_of([math.nan, 1.0, math.inf, 1.1])).donors
        assert {donors[0], donors[2]} <= {1, 3}
    with pytest.raises(EvaluationError, match="round 5: none of the 4 members"):
        pbt.evolve(population, pbt.plan(5, 100), fitness_of([math.nan] * 4))


def test_exploring_resamples_over_the_bounds_or_multiplies_by_a_factor():
    # lr over [1e-3, 1e3] on a log scale: a draw of 0.75 is three quarters of six decades up.
    assert explored(LR, 2.0, 0.25, FACTORS, (0.2, 0.75)) == pytest.approx(10**1.5)
    assert explored(LR, 2.0, 0.25, FACTORS, (0.3, 0.1)) == pytest.approx(2.4)
    assert explored(LR, 2.0, 0.25, FACTORS, (0.3, 0.6)) == pytest.approx(1.6)
    assert explored(DROPOUT, 0.1, 0.25, FACTORS, (0.2, 0.75)) == pytest.approx(0.375)  # linear over [0, 0.5]
    assert explored(DROPOUT, 0.1, 0.25, FACTORS, (0.3, 0.6)) == pytest.approx(0.08)
    assert explored(WHOLE, 2.0, 0.25, FACTORS, (0.2, 0.5)) == 3.0  # sqrt(8), whole


def test_values_are_reflected_at_their_bounds_and_odds_are_perturbed_on_a_logit_scale():
    assert perturbed(LR, 900.0, 1.2) == pytest.approx(1000 / 1.08)
    assert perturbed(DROPOUT, 0.45, 1.2) == pytest.approx(0.46)
    assert perturbed(BETA, 0.9, 1.2) == pytest.approx(10.8 / 11.8)
    assert perturbed(BETA, 0.9, 0.8) == pytest.approx(7.2 / 8.2)


@pytest.mark.parametrize(
    ("value", "factor", "expected"),
    [(2.0, 1.2, 3.0), (2.0, 0.8, 1.0), (1.0, 0.8, 2.0), (8.0, 1.2, 7.0), (5.0, 1.2, 6.0), (5.0, 0.8, 4.0)],
)
def test_whole_numbers_move_by_one_at_least_and_stay_inside(value, factor, expected):
    assert perturbed(WHOLE, value, factor) == expected


def test_copies_explore_from_their_donors_values_and_the_others_go_on_as_they_were():
    pbt = build("pbt", facts(genes=(LR, DROPOUT)), {"resample_probability": 0.0})
    population = Population(tuple(Genome({"lr": 1.0 + m, "dropout": 0.1 * (1 + m)}, {}) for m in range(4)))
    decision = pbt.evolve(population, pbt.plan(3, 60), fitness_of([4.0, 1.0, 3.0, 2.0]))
    assert decision.donors == (1, 1, 2, 3)
    assert decision.population.genomes[1:] == population.genomes[1:]
    values = decision.population.genomes[0].values
    assert values["lr"] / 2.0 == pytest.approx(1.2) or values["lr"] / 2.0 == pytest.approx(0.8)
    assert values["dropout"] / 0.2 == pytest.approx(1.2) or values["dropout"] / 0.2 == pytest.approx(0.8)
    assert decision.reasons[0] == "exploits 1, explores"


def test_a_quarter_of_what_is_explored_is_resampled_and_up_is_as_likely_as_down():
    """4000 explorations: the shares have standard errors of 0.007 and 0.009, so that 0.03 off shows with power 0.98."""
    pbt = build("pbt", facts(population_size=4001))
    values = np.array([genome.values["lr"] for genome in pbt.init(fitness_of([3.0] * 4001)).genomes[1:]])
    up, down = np.isclose(values, 1.2), np.isclose(values, 0.8)
    assert np.mean(~up & ~down) == pytest.approx(0.25, abs=0.02)
    assert up.sum() / (up | down).sum() == pytest.approx(0.5, abs=0.027)
    resampled = np.log10(values[~up & ~down])
    # Uniform over six decades: mean 0, standard deviation sqrt(3); a thousand of them.
    assert resampled.mean() == pytest.approx(0.0, abs=0.17) and resampled.std() == pytest.approx(3**0.5, abs=0.1)


def test_the_first_member_starts_as_configured_and_the_others_as_asked():
    start = fitness_of([3.0] * 4)
    genomes = {s: build("pbt", facts(), {"start": s}).init(start).genomes for s in ("explored", "resampled", "equal")}
    assert all(of[0].values == {"lr": 1.0} for of in genomes.values())
    assert len({genome.digest() for genome in genomes["equal"]}) == 1
    lrs = [genome.values["lr"] for genome in genomes["resampled"][1:]]
    assert len(set(lrs)) == 3 and all(abs(math.log(lr)) > 0.3 for lr in lrs)


@pytest.mark.parametrize("exploit", ["truncation", "ttest"])
def test_decisions_do_not_depend_on_the_order_of_keys_and_do_on_seed_and_round(exploit):
    rng = np.random.default_rng(2)
    fitness = Fitness.from_losses(rng.permutation(8.0 * np.arange(8))[:, None] + rng.standard_normal((8, 4)))

    def decide(seed: int, index: int, names=("lr", "dropout")):
        pbt = build("pbt", facts(genes=(LR, DROPOUT), seed=seed, population_size=8), {"exploit": exploit})
        population = Population(tuple(Genome(dict.fromkeys(names, 0.1 + m / 20), {}) for m in range(8)))
        return pbt.evolve(population, pbt.plan(index, 20 * index), fitness)

    assert decide(1, 2) == decide(1, 2, names=("dropout", "lr"))
    assert len({tuple(decide(seed, 2).donors) for seed in range(8)}) > 1
    assert len({tuple(decide(1, index).donors) for index in range(8)}) > 1
