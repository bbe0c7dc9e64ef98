from __future__ import annotations

import math

import pytest

from clantune_scale.core.rounds import Phase, PhaseKind, RoundClock, RoundPlan, expected_steps, sees_samples_once


def plan(index: int, start_step: int) -> RoundPlan:
    phases = (Phase(PhaseKind.COOPERATIVE, 3), Phase(PhaseKind.COMPETITIVE, 2, batch_factor=2))
    return RoundPlan(index, start_step, phases)


def test_a_step_has_one_position_whatever_was_asked_before():
    clock = RoundClock(plan)
    assert clock.at(23).plan.index == 4  # far ahead first, as a prefetching loader asks
    positions = [clock.at(step) for step in range(12)]
    assert [(p.plan.index, p.phase_index, p.offset) for p in positions[3:7]] == [
        (0, 1, 0),
        (0, 1, 1),
        (1, 0, 0),
        (1, 0, 1),
    ]
    assert [p.step for p in positions if p.ends_round] == [4, 9]


def test_an_empty_phase_is_refused():
    clock = RoundClock(lambda index, start: RoundPlan(index, start, (Phase(PhaseKind.COOPERATIVE, 0),)))
    with pytest.raises(ValueError, match="round 0 at step 0 was planned with an empty phase"):
        clock.at(0)


def test_members_regroup_from_a_round_on_also_in_plans_that_were_made_ahead():
    clock = RoundClock(plan)
    assert clock.at(23).phase.teams is None
    clock.regroup(2, (0, 0, 1))
    assert [clock.round(index).phases[1].teams for index in range(4)] == [None, None, (0, 0, 1), (0, 0, 1)]
    assert clock.at(23).phase == Phase(PhaseKind.COMPETITIVE, 2, batch_factor=2, teams=(0, 0, 1))
    assert clock.round(3).phases[0] == plan(3, 15).phases[0]  # cooperation knows no teams
    fresh = RoundClock(plan)
    fresh.regroup(2, (0, 0, 1))  # after a resume, say: nothing was planned yet
    assert [fresh.round(index).phases[1].teams for index in range(3)] == [None, None, (0, 0, 1)]
    clock.regroup(3, None)
    assert [clock.round(index).phases[1].teams for index in range(4)] == [None, None, (0, 0, 1), None]


def test_one_team_of_all_cooperates():
    clock = RoundClock(plan)
    clock.regroup(0, (2, 2, 2))
    assert clock.round(0).phases[1] == Phase(PhaseKind.COOPERATIVE, 2, batch_factor=2)


@pytest.mark.parametrize(
    ("num_samples", "total_steps", "is_once"),
    [
        (800, 100, True),
        (799, 100, False),
        (None, 100, False),
        (math.inf, 100, True),
        (8 * 600, None, True),  # a run of unknown length has 60 rounds
        (8 * 599, None, False),
    ],
)
def test_samples_are_seen_once_where_there_are_as_many_as_the_run_takes(num_samples, total_steps, is_once):
    steps = expected_steps(total_steps, round_length_steps=10)
    assert sees_samples_once(num_samples, batch_size=8, num_steps=steps) is is_once
