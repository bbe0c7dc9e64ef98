from __future__ import annotations

import pytest

from clantune_scale.core.rounds import Phase, PhaseKind, RoundClock, RoundPlan
from clantune_scale.runtime.phases import PhaseManager

COOPERATE, COMPETE = Phase(PhaseKind.COOPERATIVE, 2), Phase(PhaseKind.COMPETITIVE, 1)


def clock() -> RoundClock:
    return RoundClock(lambda index, start_step: RoundPlan(index, start_step, (COOPERATE, COMPETE)))


def test_the_flag_follows_the_phases_and_moves_with_advance_alone():
    manager = PhaseManager(clock())
    flags = []
    for _ in range(7):
        flags.append([manager.is_sharing for _ in range(2)])
        manager.advance()
    assert flags == [[True, True], [True, True], [False, False]] * 2 + [[True, True]]


def test_advance_returns_what_was_completed():
    manager = PhaseManager(clock())
    completed = [manager.advance() for _ in range(4)]
    places = [(done.step, done.plan.index, done.offset) for done in completed]
    assert places == [(0, 0, 0), (1, 0, 1), (2, 0, 0), (3, 1, 0)]
    assert [done.ends_phase for done in completed] == [False, True, True, False]
    assert [done.ends_round for done in completed] == [False, False, True, False]
    assert manager.position.step == 4


def test_it_starts_where_the_run_stands():
    manager = PhaseManager(clock(), step=5)
    assert not manager.is_sharing and manager.position.plan.index == 1
    manager.advance()
    assert manager.is_sharing


def test_suspended_shares_nothing_and_gives_back_what_it_found():
    manager = PhaseManager(clock())
    with manager.suspended():
        assert not manager.is_sharing
        with manager.suspended():
            assert not manager.is_sharing
        assert not manager.is_sharing
    assert manager.is_sharing
    with pytest.raises(ZeroDivisionError), manager.suspended():
        raise ZeroDivisionError
    assert manager.is_sharing


def test_suspended_does_not_turn_a_competitive_phase_into_a_cooperative_one():
    manager = PhaseManager(clock(), step=2)
    with manager.suspended():
        pass
    assert not manager.is_sharing
