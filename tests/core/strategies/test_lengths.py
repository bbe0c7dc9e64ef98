from __future__ import annotations

import pytest

from clantune_scale.core.rounds import PhaseKind
from clantune_scale.core.strategies.lengths import competitive_steps, phases, round_end


@pytest.mark.parametrize(
    ("start", "length", "boundary", "end"),
    [
        (0, 20, None, 20),
        (0, 20, 100, 20),
        (80, 20, 100, 100),
        (90, 20, 100, 100),  # cut at the boundary
        (70, 20, 99, 99),  # 9 steps would remain, less than half a round: taken in
        (70, 20, 100, 90),  # 10 steps remain, half a round: kept
        (100, 20, 100, 120),  # the boundary has passed
    ],
)
def test_no_round_crosses_the_boundary_and_no_stump_remains(start, length, boundary, end):
    assert round_end(start, length, boundary) == end


def test_a_competitive_phase_is_neither_nothing_nor_everything():
    assert competitive_steps(100, 0.1) == 10
    assert competitive_steps(5, 0.01) == 1
    assert competitive_steps(5, 1.0) == 4
    assert competitive_steps(5, 0.0) == 0
    assert competitive_steps(1, 0.5) == 0


def test_phases_fill_the_round_with_the_competition_last():
    assert [p.kind for p in phases(10, 0, keeps=True)] == [PhaseKind.COOPERATIVE]
    cooperative, competitive = phases(10, 3, keeps=False)
    assert (cooperative.num_steps, competitive.num_steps, competitive.keeps) == (7, 3, False)
