from __future__ import annotations

import json
import math

import numpy as np
import pytest

from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Genome
from clantune_scale.core.lineage import Lineage, RoundRecord
from clantune_scale.core.mutation import CLAN
from clantune_scale.core.rounds import Phase, PhaseKind, RoundPlan
from clantune_scale.core.strategies.base import Decision, Population
from clantune_scale.errors import ConfigError

PHASES = (Phase(PhaseKind.COOPERATIVE, 8), Phase(PhaseKind.COMPETITIVE, 2, keeps=False))


def record(
    index: int, donors: tuple[int, ...], restored: bool = False, average=None, phases=PHASES, kept=None
) -> RoundRecord:
    kept = not restored if kept is None else kept
    genomes = tuple(Genome({"lr": 1.0 + index + m / 10}, {"lr": 0.1}) for m in range(len(donors)))
    return RoundRecord(index, 10 * index, phases, genomes, (1.0, None, 2.0), donors, restored, kept, average)


def test_an_ancestry_follows_donors_backwards():
    # After round 0 member 0 carries what 2 trained; after round 1, 1 carries what 0 trained.
    lineage = Lineage((record(0, (2, 1, 2)), record(1, (0, 0, 2)), record(2, (0, 1, 1))))
    assert lineage.ancestry(2) == (2, 0, 1)
    assert lineage.ancestry(0) == (2, 0, 0)


def test_a_restored_round_left_nothing_behind():
    lineage = Lineage((record(0, (2, 2, 2)), record(1, (0, 1, 2), restored=True), record(2, (1, 1, 1))))
    assert lineage.ancestry(0) == (2, None, 1)


def test_going_back_undoes_every_round_since_the_one_that_was_kept():
    lineage = Lineage(
        (
            record(0, (2, 2, 2)),
            record(1, (1, 1, 1)),
            record(2, (0, 0, 0), kept=False),
            record(3, (0, 1, 2), kept=False),
            record(4, (0, 1, 2), restored=True),
            record(5, (1, 1, 1), kept=False),  # not kept and not gone back from: it counts
        )
    )
    assert lineage.ancestry(0) == (2, 1, None, None, None, 1)


def test_an_average_makes_ancestors_of_all_its_members_and_of_their_donors():
    # After round 1, member 1 takes what 2 trained, then all take a quarter of 0's, a quarter of 1's, a half of 2's.
    lineage = Lineage(
        (
            record(0, (0, 0, 2)),
            record(1, (0, 2, 2), average=(0.25, 0.25, 0.5)),
            record(2, (0, 1, 1)),
        )
    )
    assert lineage.shares(2) == ((0.25, 0.0, 0.75), (0.25, 0.0, 0.75), (0.0, 1.0, 0.0))
    assert lineage.ancestry(2) == (CLAN, CLAN, 1)


def test_an_average_of_one_member_is_a_transfer_from_it():
    lineage = Lineage((record(0, (0, 1, 2), average=(0.0, 1.0, 0.0)), record(1, (0, 1, 2), restored=True)))
    assert lineage.ancestry(2) == (1, None)


def test_rounds_are_appended_in_order_only():
    lineage = Lineage((record(0, (0, 1, 2)),))
    with pytest.raises(ValueError, match="round 2 from step 20 cannot follow: round 1 from step 10 is next"):
        lineage.append(record(2, (0, 1, 2)))


def test_a_record_is_made_of_what_a_round_ends_with():
    plan = RoundPlan(0, 0, PHASES)
    genomes = (Genome({}), Genome({}))
    fitness = Fitness.from_losses(np.array([[1.0, 2.0], [math.nan, 1.0]]))
    made = RoundRecord.of(plan, genomes, fitness, Decision(Population(genomes), (0, 0), mixing_weights=(1.0, 0.0)))
    assert (made.losses, made.donors, made.end_step, made.average) == ((1.5, None), (0, 0), 10, (1.0, 0.0))
    assert made.kept and not made.restored
    back = RoundRecord.of(plan, genomes, fitness, Decision(Population(genomes), (0, 1), rolls_back=True))
    assert back.restored and not back.kept


def test_json_brings_everything_back_and_refuses_another_version():
    teams = (Phase(PhaseKind.COMPETITIVE, 10, teams=(0, 1, 0)),)
    lineage = Lineage(
        (
            record(0, (2, 1, 2)),
            record(1, (0, 1, 2), restored=True),
            record(2, (0, 1, 2), average=(0.5, 0.5, 0.0), phases=teams),
        )
    )
    data = json.loads(json.dumps(lineage.to_json(), allow_nan=False))
    assert list(Lineage.from_json(data)) == list(lineage)
    before_teams = [{key: item[key] for key in item if key != "average"} for item in data["rounds"][:2]]
    for item in before_teams:
        item["phases"] = [{key: phase[key] for key in phase if key != "teams"} for phase in item["phases"]]
    assert list(Lineage.from_json({**data, "rounds": before_teams})) == list(lineage)[:2]
    with pytest.raises(ConfigError, match="'lineage' of schema 2, not 'lineage' of schema 1"):
        Lineage.from_json({**data, "schema": 2})
