from __future__ import annotations

import math

import numpy as np
import pytest

from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.rounds import Phase, PhaseKind
from clantune_scale.core.strategies import Population, build
from clantune_scale.core.strategies.hdet import multipliers, softmax_weights
from clantune_scale.errors import ConfigError, EvaluationError
from tests.core.strategies.facts import DROPOUT, LR, WEIGHT_DECAY, facts, fitness_of

START = fitness_of([3.0] * 4)
ALPHA = {"spread": 0.3}


def losses_for(weights, sigma=0.1):
    """Losses whose softmax weights are in proportion to ``weights``: sigma ln(weight) below 1."""
    return fitness_of([1.0 - sigma * math.log(weight) for weight in weights])


def lrs(population) -> list[float]:
    return [genome.values["lr"] for genome in population.genomes]


def by_rank(population, weights):
    """By member, what ``weights`` give to the ranks of its learning rate, lowest rate first."""
    order = np.argsort(np.argsort(lrs(population)))
    return [weights[rank] for rank in order]


def a_round(hdet, population, weights, index):
    return hdet.evolve(population, hdet.plan(index, 20 * index), losses_for(by_rank(population, weights)))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, [1.0]),
        (2, [0.7, 1.3]),  # (N-1)/2 = 0.5
        (3, [0.7, 1.0, 1.3]),
        (4, [0.7, 0.9, 1.1, 1.3]),  # (r - 1.5) / 1.5 = -1, -1/3, 1/3, 1
        (5, [0.7, 0.85, 1.0, 1.15, 1.3]),
    ],
)
def test_multipliers_by_hand(size, expected):
    assert multipliers(size, 0.3) == pytest.approx(expected)


def test_rounds_cooperate_throughout_and_the_last_is_averaged_too():
    hdet = build("hdet", facts(genes=(LR, DROPOUT)))
    for index, start in ((0, 0), (49, 980)):
        plan = hdet.plan(index, start)
        assert plan.phases == (Phase(PhaseKind.COOPERATIVE, 20),)
        assert (plan.explores, plan.evolves) == (("lr",), True)


def test_members_spread_around_the_start_and_unexpressed_genes_stay():
    population = build("hdet", facts(genes=(LR, DROPOUT)), ALPHA).init(START)
    assert sorted(lrs(population)) == pytest.approx([0.7, 0.9, 1.1, 1.3])
    assert {genome.values["dropout"] for genome in population.genomes} == {0.1}


def test_two_rounds_by_hand():
    """Weights 0.1, 0.2, 0.3, 0.4 on rho = 0.7, 0.9, 1.1, 1.3, sigma 0.1, beta 0.9, lambda 0.5, gamma 0.01.

    | round | delta                                             | v                    | base                    |
    |-------|---------------------------------------------------|----------------------|-------------------------|
    | 0     | 0.1(-0.3) + 0.2(-0.1) + 0.3(0.1) + 0.4(0.3) = 0.1 | 0.1 x 0.1 = 0.01     | 1 (1 + 0.005) + 0       |
    | 1     | 0.1                                               | 0.009 + 0.01 = 0.019 | 1.005 (1.0095) - 5e-5   |
    """
    hdet = build("hdet", facts(), ALPHA)
    first = a_round(hdet, hdet.init(START), [1, 2, 3, 4], 0).population
    assert first.memory["velocity"]["lr"] == pytest.approx(0.01)
    assert first.memory["base"]["lr"] == pytest.approx(1.005)
    assert sorted(lrs(first)) == pytest.approx([0.7035, 0.9045, 1.1055, 1.3065])
    second = a_round(hdet, first, [1, 2, 3, 4], 1).population
    assert second.memory["velocity"]["lr"] == pytest.approx(0.019)
    assert second.memory["base"]["lr"] == pytest.approx(1.0144975)


def test_lower_rates_that_do_better_lower_the_base_and_equals_leave_it_to_the_pull():
    hdet = build("hdet", facts(), {**ALPHA, "momentum": 0.0, "rate": 1.0, "pull": 0.1})
    first = a_round(hdet, hdet.init(START), [4, 3, 2, 1], 0).population
    assert first.memory["base"]["lr"] == pytest.approx(0.9)  # delta = v = -0.1
    second = a_round(hdet, first, [1, 1, 1, 1], 1).population
    assert second.memory["velocity"]["lr"] == pytest.approx(0.0)
    assert second.memory["base"]["lr"] == pytest.approx(0.91)  # a tenth of the way back up to 1


def test_softmax_weights_by_hand():
    # s = (mean - loss) / 0.1 = 1, 0, -1: e / (e + 1 + 1/e) and so on.
    total = math.e + 1 + 1 / math.e
    assert softmax_weights([0.9, 1.0, 1.1], 0.1) == pytest.approx([math.e / total, 1 / total, 1 / math.e / total])
    assert softmax_weights([1e9, 1.0, math.inf, math.nan], 0.1) == [0.0, 1.0, 0.0, 0.0]  # far apart: no overflow


def test_all_members_are_averaged_in_equal_parts_and_nobody_is_copied():
    hdet = build("hdet", facts(), ALPHA)
    decision = a_round(hdet, hdet.init(START), [1, 2, 3, 4], 0)
    assert decision.mixing_weights == (0.25, 0.25, 0.25, 0.25)
    assert decision.donors == (0, 1, 2, 3)
    assert not decision.rolls_back


@pytest.mark.parametrize("options", [{"adapts": False}, {"warmup_steps": 20}])
def test_without_adaptation_members_still_spread_and_are_averaged(options):
    hdet = build("hdet", facts(), {**ALPHA, **options})
    decision = a_round(hdet, hdet.init(START), [1, 2, 3, 4], 0)
    assert decision.population.memory == {"base": {"lr": 1.0}, "velocity": {"lr": 0.0}}
    assert decision.mixing_weights == (0.25,) * 4
    assert sorted(lrs(decision.population)) == pytest.approx([0.7, 0.9, 1.1, 1.3])


def test_adaptation_begins_after_the_warmup():
    hdet = build("hdet", facts(), {**ALPHA, "warmup_steps": 20})
    assert a_round(hdet, hdet.init(START), [1, 2, 3, 4], 1).population.memory["base"]["lr"] > 1


def test_a_loss_that_is_not_finite_has_no_weight_anywhere():
    hdet = build("hdet", facts(), {**ALPHA, "momentum": 0.0, "rate": 1.0, "pull": 0.0})
    population = hdet.init(START)
    losses = by_rank(population, [1.0, 1.0, 1.0, math.nan])
    broken = losses.index(max(losses, key=math.isnan))
    decision = hdet.evolve(population, hdet.plan(0, 0), fitness_of(losses))
    # The three others weigh a third each: delta = (-0.3 - 0.1 + 0.1) / 3 = -0.1.
    assert decision.population.memory["base"]["lr"] == pytest.approx(0.9)
    assert all(math.isfinite(lr) for lr in lrs(decision.population))
    assert decision.mixing_weights[broken] == 0 and sum(decision.mixing_weights) == pytest.approx(1)
    assert decision.donors[broken] == min(set(range(4)) - {broken})  # a fit one's optimizer state
    assert "not finite" in decision.reasons[broken]
    with pytest.raises(EvaluationError, match="round 0: none of the 4 members"):
        hdet.evolve(population, hdet.plan(0, 0), fitness_of([math.nan] * 4))


def test_the_base_is_clamped_to_the_bounds_and_its_change_to_the_largest():
    options = {"spread": 0.9, "momentum": 0.0, "rate": 1.0, "pull": 0.0}
    narrow = Gene("lr", relative=True, bounds=(0.5, 1.2))
    for weights, bound in (([1, 1e9], 1.2), ([1e9, 1], 0.5)):
        hdet = build("hdet", facts(genes=(narrow,), population_size=2), options)
        population = hdet.init(START)
        for index in range(5):
            population = a_round(hdet, population, weights, index).population
            assert all(0.5 <= lr <= 1.2 for lr in lrs(population))
        assert population.memory["base"]["lr"] == pytest.approx(bound)
    slow = Gene("lr", relative=True, max_change=0.05)
    hdet = build("hdet", facts(genes=(slow,), population_size=2), options)
    moved = a_round(hdet, hdet.init(START), [1, 1e9], 0).population
    assert moved.memory["base"]["lr"] == pytest.approx(math.exp(0.05))


def test_rates_stay_bounded_and_come_back_when_losses_stop_favouring_them():
    """However long higher rates win, lambda alpha < gamma bounds the base; and the pull then brings it back to 1."""
    hdet = build("hdet", facts(), {"spread": 0.1, "momentum": 0.9, "rate": 0.5, "pull": 0.1})
    population = hdet.init(START)
    for index in range(200):
        population = a_round(hdet, population, [1e-9, 1e-9, 1e-9, 1], index).population
    # base (1 + 0.5 x 0.1) + 0.1 (1 - base) = base at base = 0.1 / (0.1 - 0.05) = 2.
    assert population.memory["base"]["lr"] == pytest.approx(2.0, rel=1e-3)
    for index in range(200):
        population = a_round(hdet, population, [1, 1, 1, 1], index).population
    assert population.memory["base"]["lr"] == pytest.approx(1.0, rel=1e-3)


def test_each_gene_is_dealt_by_a_permutation_of_its_own():
    """200 rounds of 8 members: the mean rank correlation of two genes' deals, with a standard error of 0.027, is 0."""
    genes = (LR, WEIGHT_DECAY, Gene("lr:head", target="lr", groups=("head",), relative=True))
    hdet = build("hdet", facts(genes=genes, population_size=8), {"adapts": False})
    population = hdet.init(fitness_of([1.0] * 8))
    deals = []
    for index in range(200):
        values = np.array([[g.values[gene.name] for gene in genes] for g in population.genomes])
        deals.append(np.argsort(np.argsort(values, axis=0), axis=0))
        population = hdet.evolve(population, hdet.plan(index, 20 * index), fitness_of([1.0] * 8)).population
    correlations = np.mean([np.corrcoef(deal.T) for deal in deals], axis=0)
    assert np.abs(correlations[np.triu_indices(3, 1)]).max() < 0.1
    firsts = [tuple(deal[:, 0]) for deal in deals]
    assert len(set(firsts)) > 190  # and anew in each round


def test_genes_on_other_scales_spread_too_and_what_is_zero_stays():
    momentum = Gene("momentum", scale="logit", bounds=(0.5, 0.995), initial=0.9)
    linear = Gene("weight_decay", scale="linear", bounds=(0.0, 1.0), initial=0.1)
    zero = Gene("eps", scale="linear", bounds=(0.0, 1.0), initial=0.0)
    hdet = build("hdet", facts(genes=(momentum, linear, zero), population_size=2), ALPHA)
    genomes = hdet.init(START).genomes
    odds = sorted(g.values["momentum"] / (1 - g.values["momentum"]) for g in genomes)
    assert odds == pytest.approx([9 * 0.7, 9 * 1.3])
    assert sorted(g.values["weight_decay"] for g in genomes) == pytest.approx([0.07, 0.13])
    assert {g.values["eps"] for g in genomes} == {0.0}
    assert hdet.plan(0, 0).explores == ("momentum", "weight_decay")


def test_decisions_depend_on_seed_and_round_and_on_no_order_of_keys():
    def decide(seed=1, index=2, flip=False):
        hdet = build("hdet", facts(genes=(LR, WEIGHT_DECAY), seed=seed), ALPHA)
        population = hdet.init(START)
        if flip:
            genomes = (Genome(dict(reversed(g.values.items())), g.step_sizes) for g in population.genomes)
            memory = {key: dict(reversed(of.items())) for key, of in reversed(population.memory.items())}
            population = Population(tuple(genomes), memory)
        return hdet.evolve(population, hdet.plan(index, 20 * index), losses_for([4, 1, 3, 2]))

    assert decide() == decide(flip=True)
    assert decide().reasons != decide(seed=2).reasons or decide().population != decide(seed=2).population
    assert decide().population != decide(index=3).population


def test_options_that_could_turn_a_rate_negative_are_refused():
    with pytest.raises(ConfigError, match="rate is 4.0. It must be at least 0 and, times spread, below 1"):
        build("hdet", facts(), {"spread": 0.3, "rate": 4})
