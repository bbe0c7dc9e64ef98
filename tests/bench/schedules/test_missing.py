"""Figures of what is missing, on numbers made by hand."""

from __future__ import annotations

import math

import pytest

from clantune_scale.bench.schedules.missing import StartFigures, by_kind, figures_of, rows, rows_by_problem
from clantune_scale.bench.schedules.pictures import draw_missing
from clantune_scale.bench.schedules.scores import ReferenceLosses
from clantune_scale.bench.schedules.trial import Trial, TrialRun

# Progress from 5 to 1: a loss of 1.4 misses a tenth.
REFERENCE = ReferenceLosses(
    problem="x",
    starts=("low", "peak"),
    default_losses=(3.0, 1.0),
    oracle_loss=1.0,
    initial_loss=5.0,
    losses_by_share={},
    default_runs=((3.0, 3.2, 2.8), (1.0, 1.2, 0.8)),
    oracle_runs=(1.0, 1.2, 0.8),
    kinds=("wild", "tuned"),
    default_validation=((3.0, 3.0, 3.0), (1.0, 1.0, 1.0)),
)


def trial(*starts: list[float], validation=((10, 4.0), (20, 2.5), (40, 2.0))) -> Trial:
    runs = tuple(tuple(TrialRun(loss, 1.1, (), 0, validation) for loss in losses) for losses in starts)
    return Trial("m", "x", runs, 0.1)


def test_what_is_missing_is_counted_seed_by_seed_against_the_oracles_own_run():
    low, peak = figures_of(trial([1.4, 1.6, 1.2], [1.04, 1.24, 0.84]), REFERENCE)
    assert low.configured == pytest.approx((0.5,) * 3) and low.missing == pytest.approx((0.1,) * 3)
    assert low.harms == pytest.approx([-0.4] * 3) and low.sign == -1
    assert peak.configured == pytest.approx((0.0,) * 3) and peak.harms == pytest.approx([0.01] * 3) and peak.sign == 1
    assert (low.kind, peak.kind, low.has_room, peak.has_room) == ("wild", "tuned", True, False)
    assert low.s1 == pytest.approx(0.8) and low.excess == pytest.approx(0.4) and low.cost == 1.1
    assert low.reached == (0.5,) * 3  # at step 20 of 40
    assert peak.reached == (math.inf,) * 3


def test_a_loss_that_only_passes_what_was_configured_is_not_down_there():
    curve = ((10, 2.9), (20, 3.5), (30, 3.01), (40, 2.9))
    low, _ = figures_of(trial([1.4] * 3, [1.0] * 3, validation=curve), REFERENCE)
    assert low.reached == (0.75,) * 3  # 0.01 is within half a percent of the progress
    diverged, _ = figures_of(trial([math.inf] * 3, [1.0] * 3, validation=()), REFERENCE)
    assert diverged.reached == () and diverged.missing == (1.0,) * 3 and diverged.sign == 1


def test_a_difference_within_noise_is_none():
    noisy = StartFigures("x", "a", "wild", (0.1, 0.1, 0.1), (0.1, 0.3, 0.1), 0.0, True, 0.1, 1.0, ())
    assert sum(noisy.harms) == pytest.approx(0.2) and noisy.sign == 0
    tiny = StartFigures("x", "a", "wild", (0.1, 0.1, 0.1), (0.104, 0.104, 0.104), 0.0, True, 0.1, 1.0, ())
    assert tiny.sign == 0


def start(problem: str, kind: str, configured: float, missing: tuple[float, ...], **changes) -> StartFigures:
    own = {"s1": 0.95, "has_room": True, "excess": 0.2, "cost": 1.2, "reached": (0.5, math.inf)}
    return StartFigures(problem, "a", kind, (configured,) * len(missing), missing, **{**own, **changes})


FIGURES = [
    start("x", "wild", 0.5, (0.1, 0.3)),
    start("y", "wild", 0.3, (0.1, 0.1), s1=0.5),
    start("x", "tuned", 0.02, (0.05, 0.05), has_room=False),
]


def test_kinds_are_means_over_starts_with_errors_over_seeds_and_over_problems():
    wild, tuned, everything = by_kind(FIGURES)
    assert [own.kind for own in (wild, tuned, everything)] == ["wild", "tuned", "all"]
    assert (wild.num_starts, wild.num_problems, everything.num_starts) == (2, 2, 3)
    assert (wild.configured, wild.missing, wild.harm) == pytest.approx((0.4, 0.15, -0.25))
    # Seeds: means over starts of -0.3 and -0.2. Problems: x -0.3, y -0.2.
    assert wild.seed_error == pytest.approx(0.05) and wild.problem_error == pytest.approx(0.05)
    assert (wild.num_solved, wild.num_with_room, tuned.num_with_room) == (1, 2, 0)
    assert (wild.num_better, wild.num_worse, tuned.num_worse) == (2, 0, 1)
    assert wild.never == 0.5 and math.isnan(tuned.problem_error)


def test_tables_have_a_row_for_every_kind_and_method_and_for_every_problem():
    table = rows({"m": FIGURES, "n": FIGURES})
    assert [row[:2] for row in table] == [[kind, name] for kind in ("wild", "tuned", "all") for name in ("m", "n")]
    assert table[0][3:8] == ["40.0", "15.0", "-25.0 (± 5.0, 5.0)", "0, 2", "1 of 2"]
    assert table[2][10] == "- (never: 50 %)"
    columns, problems = rows_by_problem({"m": FIGURES, "n": FIGURES})
    assert columns == ["missing, %", "wild", "tuned"]
    assert problems == [["x", "50.0 20.0 20.0", "2.0 5.0 5.0"], ["y", "30.0 10.0 10.0", ""]]


def test_a_picture_shows_both_shares_of_every_start(tmp_path):
    path = draw_missing({"m": FIGURES, "n": FIGURES}, tmp_path / "missing.png")
    assert path.read_bytes().startswith(b"\x89PNG")
