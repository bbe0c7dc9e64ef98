from __future__ import annotations

import json
from dataclasses import replace

import pytest

from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.lineage import Lineage, RoundRecord
from clantune_scale.core.rounds import Phase, PhaseKind
from clantune_scale.core.schedule import ClanSchedule
from clantune_scale.errors import ConfigError

LR = Gene("lr", relative=True)
DROPOUT = Gene("dropout", kind="specialized", scale="linear", bounds=(0.0, 0.5), initial=0.1)
GENES = (LR, DROPOUT)
COOPERATE = Phase(PhaseKind.COOPERATIVE, 8)
COMPETE = Phase(PhaseKind.COMPETITIVE, 2)


def record(index, lrs, dropouts, donors, *, keeps=True, restored=False):
    genomes = tuple(Genome({"lr": lr, "dropout": d}) for lr, d in zip(lrs, dropouts, strict=True))
    phases = (COOPERATE, Phase(PhaseKind.COMPETITIVE, 2, keeps=keeps))
    return RoundRecord(index, 10 * index, phases, genomes, (1.0, 2.0), donors, restored)


@pytest.fixture
def lineage() -> Lineage:
    return Lineage(
        (
            record(0, (1.0, 2.0), (0.1, 0.3), (1, 1)),
            record(1, (3.0, 4.0), (0.1, 0.2), (0, 1), restored=True),
            record(2, (5.0, 6.0), (0.2, 0.4), (0, 0), keeps=False),
        )
    )


def test_values_follow_the_ancestry_and_specialized_ones_the_clan_while_it_cooperates(lineage):
    schedule = ClanSchedule.from_lineage(lineage, GENES, member=1)
    assert [schedule.value_at("lr", step) for step in (0, 9, 20, 27)] == [2.0, 2.0, 5.0, 5.0]
    assert schedule.value_at("dropout", 0) == pytest.approx(0.2)  # the consensus of 0.1 and 0.3
    assert schedule.value_at("dropout", 8) == 0.3  # member 1's own


def test_steps_that_were_undone_take_the_values_of_the_next_that_were_kept(lineage):
    schedule = ClanSchedule.from_lineage(lineage, GENES, member=1)
    assert schedule.value_at("lr", 15) == 5.0
    assert [segment.undone for segment in schedule.segments] == [False, False, True, True, False, True]


def test_values_of_an_averaged_state_are_the_mean_of_its_carriers_in_the_genes_scale():
    genomes = tuple(Genome({"lr": lr, "dropout": d}) for lr, d in ((1.0, 0.1), (4.0, 0.3), (9e9, 0.5)))
    record = RoundRecord(0, 0, (COOPERATE, COMPETE), genomes, (1.0, 2.0, None), (0, 1, 0), average=(0.125, 0.75, 0.125))
    schedule = ClanSchedule.from_lineage(Lineage((record,)), GENES, member=2)
    assert schedule.value_at("lr", 0) == pytest.approx(4**0.75)  # a quarter of 1, three of 4 in logarithms
    assert schedule.value_at("dropout", 8) == pytest.approx(0.25)  # linear
    assert schedule.value_at("dropout", 0) == pytest.approx(0.3)  # the consensus of all three while they cooperated


def test_the_last_value_holds_beyond_the_end(lineage):
    schedule = ClanSchedule.from_lineage(lineage, [LR], member=0)
    assert schedule.value_at("lr", 10**6) == 5.0
    with pytest.raises(ValueError, match="steps count from 0, not from -1"):
        schedule.value_at("lr", -1)


def test_the_final_decay_is_exact_at_every_step(lineage):
    def decay(step: int) -> float:
        return min(1.0, (30 - step) / 20)

    schedule = ClanSchedule.from_lineage(lineage, GENES, member=0, lr_factor=decay)
    assert [schedule.lr_factor_at(step) for step in range(31)] == pytest.approx([decay(step) for step in range(31)])
    assert schedule.lr_factor_at(99) == 0.0
    assert schedule.decay_start_step == 10
    assert ClanSchedule.from_lineage(lineage, GENES, member=0).decay_start_step is None


def test_json_brings_everything_back(lineage):
    schedule = ClanSchedule.from_lineage(lineage, GENES, member=1, lr_factor=lambda step: 1 - step / 30)
    back = ClanSchedule.from_json(schedule.to_json())
    assert back.segments == schedule.segments
    assert ClanSchedule.from_json(replace(schedule, rate_factor=0.5).to_json()).rate_factor == 0.5
    assert back.genes[0]["target"] == "lr"
    assert back.to_json() == schedule.to_json()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the schedule is not JSON"),
        ("[]", "not of kind 'clan_schedule'"),
        (json.dumps({"kind": "clan_schedule", "schema": 9}), "has schema version 9, and this version reads 1"),
    ],
)
def test_what_is_no_schedule_of_this_version_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        ClanSchedule.from_json(text)


def test_a_run_without_a_round_has_no_schedule():
    with pytest.raises(ConfigError, match="no round was finished"):
        ClanSchedule.from_lineage(Lineage(), GENES, member=0)
