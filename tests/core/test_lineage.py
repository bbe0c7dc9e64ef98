from __future__ import annotations

import json
import math

import numpy as np
import pytest

from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Genome
from clantune_scale.core.lineage import Lineage, RoundRecord
from clantune_scale.core.rounds import Phase, PhaseKind, RoundPlan
from clantune_scale.core.strategies.base import Decision, Population
from clantune_scale.errors import ConfigError

PHASES = (Phase(PhaseKind.COOPERATIVE, 8), Phase(PhaseKind.COMPETITIVE, 2, keeps=False))


def record(index: int, donors: tuple[int, ...], restored: bool = False) -> RoundRecord:
    genomes = tuple(Genome({"lr": 1.0 + index + m / 10}, {"lr": 0.1}) for m in range(len(donors)))
    return RoundRecord(index, 10 * index, PHASES, genomes, (1.0, None, 2.0), donors, restored)


def test_an_ancestry_follows_donors_backwards():
    # After round 0 member 0 carries what 2 trained; after round 1, 1 carries what 0 trained.
    lineage = Lineage((record(0, (2, 1, 2)), record(1, (0, 0, 2)), record(2, (0, 1, 1))))
    assert lineage.ancestry(2) == (2, 0, 1)
    assert lineage.ancestry(0) == (2, 0, 0)


def test_a_restored_round_left_nothing_behind():
    lineage = Lineage((record(0, (2, 2, 2)), record(1, (0, 1, 2), restored=True), record(2, (1, 1, 1))))
    assert lineage.ancestry(0) == (2, None, 1)


def test_rounds_are_appended_in_order_only():
    lineage = Lineage((record(0, (0, 1, 2)),))
    with pytest.raises(ValueError, match="round 2 from step 20 cannot follow: round 1 from step 10 is next"):
        lineage.append(record(2, (0, 1, 2)))


def test_a_record_is_made_of_what_a_round_ends_with():
    plan = RoundPlan(0, 0, PHASES)
    genomes = (Genome({}), Genome({}))
    fitness = Fitness.from_losses(np.array([[1.0, 2.0], [math.nan, 1.0]]))
    made = RoundRecord.of(plan, genomes, fitness, Decision(Population(genomes), (0, 0)))
    assert (made.losses, made.donors, made.end_step) == ((1.5, None), (0, 0), 10)
    assert RoundRecord.of(plan, genomes, fitness).donors == (0, 1)


def test_json_brings_everything_back_and_refuses_another_version():
    lineage = Lineage((record(0, (2, 1, 2)), record(1, (0, 1, 2), restored=True)))
    data = json.loads(json.dumps(lineage.to_json(), allow_nan=False))
    assert list(Lineage.from_json(data)) == list(lineage)
    with pytest.raises(ConfigError, match="'lineage' of schema 2, not 'lineage' of schema 1"):
        Lineage.from_json({**data, "schema": 2})
