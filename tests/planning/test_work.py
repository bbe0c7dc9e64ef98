"""Gradient work that is foretold, against a reference clan that counts what it does."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from clantune_scale.config.schema import ClanConfig
from clantune_scale.core.genome import Gene
from clantune_scale.core.rounds import PhaseKind
from clantune_scale.core.strategies import build
from clantune_scale.planning.budget import Size, forecast
from clantune_scale.planning.preflight import run_facts
from tests.small_references import DROPOUT, LR, SAMPLES, clan_of, network, squared_error

NUM_STEPS = 100
EVAL_BATCHES = 3
DS = {"train_micro_batch_size_per_gpu": SAMPLES}
DECAY = Gene("weight_decay", relative=True)
RACE = {"name": "clan", "options": {"trial_cost": 0.6}}


def _block(strategy, population_size: int, total_steps: int | None) -> ClanConfig:
    fitness = {"num_samples": EVAL_BATCHES * SAMPLES, "batch_size": SAMPLES}
    given = {"population_size": population_size, "strategy": strategy, "round_length": 10, "fitness": fitness}
    return ClanConfig.model_validate(given | {"total_steps": total_steps})


@pytest.mark.parametrize(
    ("strategy", "population_size", "genes", "total_steps", "num_champions"),
    [
        (RACE, 3, (LR,), NUM_STEPS, 2),
        (RACE, 8, (LR,), NUM_STEPS, 2),
        (RACE, 4, (LR,), None, 2),
        ("clan", 2, (LR, DROPOUT), NUM_STEPS, 2),
        ("classic", 2, (LR, DROPOUT), None, 1),
        ("pbt", 3, (LR,), NUM_STEPS, 1),
    ],
    ids=["race of three", "race of teams", "length unknown", "rolled back", "classic", "pbt"],
)
def test_work_is_what_a_clan_does(strategy, population_size, genes, total_steps, num_champions):
    """Exactly: the reference runs the same rounds. It measures no champion at the end."""
    block = _block(strategy, population_size, total_steps)
    how = {"world_size": population_size, "num_steps": NUM_STEPS, "hardware": None, "measured": None}
    one = forecast(DS, block, genes, Size((57,)), **how)
    cost = one.cost

    done: Counter[bool] = Counter()

    def counted(module, batch):
        done[torch.is_grad_enabled()] += len(batch[0])
        return squared_error(module, batch)

    facts = run_facts(block, genes, DS)
    clan = clan_of(build(block.strategy.name, facts, block.strategy.options), network(0.1), loss_fn=counted)
    clan.run(NUM_STEPS)
    assert one.walk.num_ended == len(clan.lineage)
    assert cost.trained_samples == done[True]
    assert cost.evaluated_samples == done[False] + num_champions * population_size * EVAL_BATCHES * SAMPLES
    plain = NUM_STEPS * population_size * SAMPLES
    assert cost.work_percent == pytest.approx(100 * ((cost.trained_samples + cost.evaluated_samples / 3) / plain - 1))


@pytest.mark.parametrize(
    ("population_size", "genes"), [(3, (LR,)), (4, (LR,)), (3, (LR, DECAY))], ids=["three", "four", "two genes"]
)
def test_work_on_the_line_is_what_one_model_does(population_size, genes):
    """Exactly: a step of the whole batch, a turn for each member that competes, an evaluation for each point."""
    block = _block(RACE, population_size, NUM_STEPS).model_copy(update={"members": "line"})
    how = {"world_size": 1, "num_steps": NUM_STEPS, "hardware": None, "measured": None}
    one = forecast(DS | {"gradient_accumulation_steps": population_size}, block, genes, Size((57,)), **how)

    done: Counter[bool] = Counter()

    def counted(module, batch):
        done[torch.is_grad_enabled()] += len(batch[0])
        return squared_error(module, batch)

    facts = run_facts(block, genes, DS)
    built = build(block.strategy.name, facts, block.strategy.options)
    clan = clan_of(built, network(0.1), loss_fn=counted, members="line")
    clan.run(NUM_STEPS)
    assert one.walk.num_ended == len(clan.lineage)
    assert one.cost.trained_samples == done[True] > one.cost.samples
    assert one.cost.evaluated_samples == done[False] + one.walk.num_champions * EVAL_BATCHES * SAMPLES
    assert one.cost.unique_samples == one.cost.samples


def test_turns_that_were_not_reached_are_not_counted():
    """The first one is the loop's own steps; the others follow at the phase's end."""
    block = _block(RACE, 4, None).model_copy(update={"members": "line"})
    how = {"world_size": 4, "hardware": None, "measured": None}
    first = next(plan for plan in forecast(DS, block, (LR,), Size((57,)), num_steps=600, **how).walk.rounds
                 if plan.phases[0].kind is PhaseKind.COMPETITIVE)  # fmt: skip
    costs = {
        num_steps: forecast(DS, block, (LR,), Size((57,)), num_steps=num_steps, **how).cost
        for num_steps in (first.end_step - 1, first.end_step)
    }
    trained = {num_steps: cost.trained_samples // (4 * SAMPLES) for num_steps, cost in costs.items()}
    assert trained == {first.end_step - 1: first.end_step - 1, first.end_step: first.end_step + 3 * first.num_steps}
