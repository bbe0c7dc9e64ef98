"""``HoldingClan``: what it leaves as it is, and what it takes from ``clan``."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from clantune_scale.bench.schedules import curves
from clantune_scale.bench.schedules.holding import RISES, HoldingClan, HoldingOptions
from clantune_scale.bench.schedules.methods import Method
from clantune_scale.bench.schedules.trial import run_trial
from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Gene
from clantune_scale.core.rounds import PhaseKind
from clantune_scale.core.strategies.base import RunFacts
from clantune_scale.errors import ConfigError
from tests.bench.schedules.tiny_problem import TINY

LR = Gene("lr", relative=True)
FACTS = RunFacts(4, (LR,), 0, 20, 0.1, total_steps=1200)
#: As it was when the variants were measured.
CLAN = Method("clan", "clan", {"prior": 1.0}, population_size=4, round_length_steps=4)
HOLDING = replace(CLAN, name="holding", strategy="clantune_scale.bench.schedules.holding:HoldingClan")


def measured(population, falls: float) -> Fitness:
    """Losses that fall with the learning rate, at a height of 1."""
    rates = np.log([genome.values["lr"] for genome in population.genomes])
    return Fitness.from_losses(np.repeat(1 - falls * rates[:, None], 4, axis=1), training_loss=0.9)


def begun(**options):
    strategy = HoldingClan(FACTS, HoldingOptions(**options))
    strategy.schedule = curves.over("warmup-linear", 1200)
    return strategy, strategy.init(Fitness.from_losses(np.full((4, 4), 2.0)))


def played(strategy, population, rounds: int, falls: float = 0.1, search_falls: float = 0.1):
    """(plan, decision) of every round, with losses that fall so in the trial and in the line search."""
    step, seen = 0, []
    for index in range(rounds):
        plan = strategy.plan(index, step)
        is_trial = any(phase.kind is PhaseKind.COMPETITIVE for phase in plan.phases)
        decision = strategy.evolve(population, plan, measured(population, falls if is_trial else search_falls))
        population, step = decision.population, plan.end_step
        seen.append((plan, decision))
    return seen


def test_learning_rates_stay_while_the_users_schedule_rises_and_move_afterwards():
    seen = played(*begun(), rounds=5)
    for plan, decision in seen:
        move, memory = decision.population.memory["moves"]["lr"], decision.population.memory
        rises = plan.end_step <= 60  # the warm-up's last step
        assert memory["rises"] == rises and (move["why"] == RISES) == rises
        assert (move["change"] == 0.0) == rises
    assert {plan.end_step <= 60 for plan, _ in seen} == {True, False}


def test_without_a_rise_it_is_clan():
    ours = run_trial(HOLDING, TINY, rates=[0.1, 0.3], seeds=(0, 1))
    theirs = run_trial(CLAN, TINY, rates=[0.1, 0.3], seeds=(0, 1))
    assert ours.runs == theirs.runs
    warmed = TINY.variant("warmed", schedule="warmup-linear", total_steps=120)
    assert run_trial(HOLDING, warmed, rates=[0.1, 0.3], seeds=(0,)).runs != (
        run_trial(CLAN, warmed, rates=[0.1, 0.3], seeds=(0,)).runs
    )


def test_the_trial_is_left_out_only_if_all_is_held():
    for hold, is_left_out in (("search", False), ("all", True)):
        strategy, population = begun(hold=hold)
        strategy.schedule = lambda step: min(1.0, step / 360)
        whys = [d.population.memory["moves"]["lr"]["why"] for _, d in played(strategy, population, 6)]
        assert ("trial" in whys) != is_left_out


def test_a_rise_of_the_trial_is_cut_to_what_its_losses_show():
    changes = []
    for evidence in (0.0, 0.05, 1.0):
        strategy, population = begun(hold="none", evidence=evidence)
        seen = played(strategy, population, 6, falls=0.02, search_falls=0.0)
        (change,) = [
            m["change"] for _, d in seen if (m := d.population.memory["moves"]["lr"])["why"].startswith("trial")
        ]
        changes.append(change)
    assert changes[0] > changes[1] > changes[2] > 0
    # Losses fall by 0.02 a log unit, of a progress of about 1.
    assert changes[2] == pytest.approx(0.02 * np.log(13) / (1.0 + 0.02 * np.log(13)), rel=0.1)


def test_evidence_below_zero_is_refused():
    with pytest.raises(ConfigError, match="evidence"):
        HoldingOptions(evidence=-1.0)
