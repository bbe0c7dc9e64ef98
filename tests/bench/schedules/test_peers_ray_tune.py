"""Ray Tune's schedulers as strategies; skipped where Ray is not installed."""

from __future__ import annotations

import logging
import math
import random
from dataclasses import replace

import numpy as np
import pytest

from clantune_scale.bench.schedules.methods import FIXED, named
from clantune_scale.bench.schedules.trial import run_trial
from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.strategies import Population, build
from tests.bench.schedules.tiny_problem import TINY
from tests.core.strategies.facts import facts, fitness_of

pytest.importorskip("ray.tune.schedulers", reason="the extra 'peers' is not installed")

PBT = "clantune_scale.bench.schedules.peers.ray_tune:RayPBT"
PB2 = "clantune_scale.bench.schedules.peers.ray_tune:RayPB2"
BOTH = pytest.mark.parametrize("name", [PBT, PB2])
LR = Gene("lr", bounds=(1e-3, 1e3), relative=True)
SIZE, START = 8, [10.0] * 8


def run_of(name, losses_by_round, seed=3, genes=(LR,), **options):
    """The strategy, its first population and its decisions, one per round of losses."""
    strategy = build(name, facts(population_size=SIZE, genes=genes, seed=seed), options)
    population = first = strategy.init(fitness_of(START))
    decisions, step = [], 0
    for index, losses in enumerate(losses_by_round):
        plan = strategy.plan(index, step)
        decisions.append(strategy.evolve(population, plan, fitness_of(losses)))
        population, step = decisions[-1].population, plan.end_step
    return first, decisions


def rates(population) -> list[float]:
    return [genome.values["lr"] for genome in population.genomes]


LOSSES = np.random.default_rng(0).permutation(8 * 6).reshape(6, 8) + 1.0


@BOTH
def test_the_weakest_quarter_copies_the_strongest(name):
    for losses, decision in zip(LOSSES, run_of(name, LOSSES)[1], strict=True):
        order = np.argsort(losses)
        copies = {member: donor for member, donor in enumerate(decision.donors) if member != donor}
        assert set(copies) == set(order[-2:].tolist())
        assert set(copies.values()) <= set(order[:2].tolist())


@BOTH
def test_only_copies_get_another_rate(name):
    before, decisions = run_of(name, LOSSES)
    num_changed = 0
    for decision in decisions:
        for member, donor in enumerate(decision.donors):
            if member == donor:
                assert rates(decision.population)[member] == pytest.approx(rates(before)[member], rel=1e-6)
            num_changed += rates(decision.population)[member] != pytest.approx(rates(before)[member], rel=1e-6)
        assert all(1e-3 <= rate <= 1e3 for rate in rates(decision.population))
        before = decision.population
    assert num_changed >= 6


def test_pbt_multiplies_or_draws_over_the_bounds():
    steps = []
    for seed in range(12):
        before, (decision,) = run_of(PBT, LOSSES[:1], seed=seed)
        assert rates(before)[0] == 1.0 and len(set(rates(before))) > 2
        steps += [
            rates(decision.population)[member] / rates(before)[donor]
            for member, donor in enumerate(decision.donors)
            if member != donor
        ]
    small = [step for step in steps if any(math.isclose(step, factor) for factor in (0.8, 1.2))]
    # 24 copies, a quarter of them drawn anew: 12 to 23 that are not lie within 2.8 standard deviations.
    assert len(steps) == 24 and 12 <= len(small) <= 23


def test_pbt_keeps_values_inside_bounds_that_a_factor_would_leave():
    tight = Gene("lr", bounds=(0.99, 1.01), relative=True)
    first, decisions = run_of(PBT, LOSSES, genes=(tight,))
    assert all(0.99 <= rate <= 1.01 for p in (first, *(d.population for d in decisions)) for rate in rates(p))


def test_pb2_starts_as_configured_and_searches_on_the_genes_scale():
    first, decisions = run_of(PB2, LOSSES)
    assert rates(first) == [1.0] * 8
    tried = {rate for decision in decisions for rate in rates(decision.population)} - {1.0}
    assert len(tried) >= 6 and min(tried) < 1 < max(tried)


def test_pb2_is_told_losses_as_rewards_and_rates_on_their_scale():
    strategy = build(PB2, facts(population_size=SIZE, genes=(LR,)), {})
    strategy.init(fitness_of(START))
    told = Population(tuple(Genome({"lr": 1.5**member}) for member in range(SIZE)))
    strategy.evolve(told, strategy.plan(0, 0), fitness_of(LOSSES[0]))
    data = strategy._scheduler.data[:SIZE]
    assert data["Reward"].tolist() == pytest.approx((-LOSSES[0]).tolist())
    assert data["lr"].tolist() == pytest.approx([member * math.log(1.5) for member in range(SIZE)])
    assert set(data["Time"]) == {20}


@BOTH
def test_decisions_follow_from_the_seed_and_global_generators_are_left_alone(name):
    random.seed(5)
    np.random.seed(5)
    states, level = (random.getstate(), np.random.get_state()[1].tolist()), logging.getLogger("ray.tune").level
    first, again, other = (run_of(name, LOSSES[:3], seed=seed)[1] for seed in (3, 3, 4))
    assert first == again != other
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    assert logging.getLogger("ray.tune").level == level


@BOTH
def test_a_loss_that_is_not_a_number_is_a_bad_one(name):
    losses = [*LOSSES[0][:7].tolist(), math.nan]
    _, decisions = run_of(name, [losses, losses])
    for decision in decisions:
        assert decision.donors[7] != 7 and 7 not in decision.donors


def test_a_member_that_was_replaced_is_a_trial_with_its_new_rate():
    strategy = build(PBT, facts(population_size=SIZE, genes=(LR,)), {})
    strategy.init(fitness_of(START))
    replaced = Population(tuple(Genome({"lr": float(2**member)}) for member in range(SIZE)))
    decision = strategy.evolve(replaced, strategy.plan(0, 0), fitness_of(list(range(1, 9))))
    assert rates(decision.population)[:6] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]


@pytest.mark.parametrize("name, members", [("ray-pbt", 1), ("ray-pb2", 1), ("ray-pbt-full", 4), ("ray-pb2-full", 4)])
def test_a_population_trains_and_costs_what_its_members_compute(name, members):
    (method,) = named([name], 4)
    method = replace(method, round_length_steps=8)
    problem = TINY.variant("longer", total_steps=120)
    trial = run_trial(method, problem, rates=[0.1, 0.3], seeds=(0,))
    untrained = run_trial(FIXED, problem, rates=[0.0, 0.0], seeds=(0,))
    assert all(loss < 0.2 * start for loss, start in zip(trial.losses, untrained.losses, strict=True))
    num_rounds = 15 // method.options.get("stretch", 1)
    evaluated = (num_rounds - 1) * 4 * 16  # the last round decides nothing
    assert trial.runs[0][0].cost == pytest.approx(members + evaluated / 3 / (120 * 8))
