from __future__ import annotations

import math

import pytest

from clantune_scale.core.genome import Gene
from clantune_scale.core.rounds import PhaseKind
from clantune_scale.core.strategies import build
from clantune_scale.core.strategies.clan.lr_trial import outcome, plan_trial, trial_steps
from tests.core.strategies.clan.test_plan import plans
from tests.core.strategies.facts import facts

OFFSETS = (0.0, 1.0, 2.0, 3.0)


def steps_of(**changes):
    return trial_steps(facts(**{"total_steps": 10_000, **changes}), at=0.07, cost=0.09)


def race_of(size: int):
    return plan_trial(steps_of(), population_size=size, reach=8.0)


def test_its_cost_is_what_groups_train_besides_the_clans_batch():
    assert steps_of() == range(700, 1000)
    for size in (3, 4, 5, 6, 7, 8, 12):
        phase = race_of(size).phase  # every member trains on batch_factor times its part of the clan's batch
        assert (phase.batch_factor - 1) * phase.num_steps == (900 if size > 3 else 600)


def test_a_clan_of_two_cannot_race_and_its_rounds_end_where_others_do():
    assert race_of(2) is None
    ends = [[plan.end_step for plan in plans(build("clan", facts(population_size=size)))] for size in (2, 4, 8)]
    assert ends[0] == ends[1] == ends[2]


@pytest.mark.parametrize(("size", "count"), [(3, 3), (4, 4), (5, 5), (6, 6), (7, 7), (8, 4), (9, 9), (10, 5), (16, 4)])
def test_trial_groups_are_teams_of_one_size(size, count):
    trial = race_of(size)
    assert {trial.teams.count(team) for team in range(count)} == {size // count}
    assert len(trial.offsets) == count


def test_offsets_rise_evenly_from_the_clans_own_rate():
    trial = race_of(8)
    assert [trial.offset(member) for member in range(8)] == pytest.approx(
        [math.log(2) * place for place in (0, 0, 1, 1, 2, 2, 3, 3)]
    )
    assert trial.phase.kind is PhaseKind.COMPETITIVE and trial.phase.keeps


def test_only_a_rate_in_factors_is_raced_for():
    assert steps_of(genes=(Gene("lr", scale="linear", bounds=(0.0, 1.0), initial=0.1),)) is None


def test_the_outcome_is_a_share_of_the_way_to_the_parabolas_minimum():
    losses = [2.0 + (offset - 1.4) ** 2 for offset in OFFSETS]
    assert outcome(OFFSETS, losses, share=1.0).change == pytest.approx(1.4)
    assert outcome(OFFSETS, losses, share=0.5).change == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("losses", "minimum"),
    [
        ([4.0, 3.0, 2.0, 1.0], 3.0),
        ([4.0, 3.0, 2.0, math.inf], 2.0),
        ([1.0, 2.0, 3.0, 4.0], 0.0),
        ([1.0, math.inf, math.inf, math.inf], 0.0),
    ],
    ids=["fastest", "beside one who diverged", "slowest", "all others diverged"],
)
def test_at_an_edge_the_fittest_itself_is_the_minimum_and_rates_never_fall(losses, minimum):
    assert outcome(OFFSETS, losses, share=1.0).change == minimum
