from __future__ import annotations

import math

import pytest

from clantune_scale.bench.schedules.scores import ReferenceLosses, Score
from clantune_scale.bench.schedules.trial import Trial, TrialRun

YARDSTICK = ReferenceLosses("x", ("low", "high"), (2.0, math.inf), 1.0, 5.0, {0.5: 1.8, 0.8: 1.2})


def trial(*losses: float, method: str = "m", cost: float = 1.1) -> Trial:
    return Trial(method, "x", tuple((TrialRun(loss, cost, (), 0),) for loss in losses), 0.1)


def test_s1_is_the_share_of_what_a_schedule_can_gain():
    assert YARDSTICK.s1(0, 2.0) == 0.0
    assert YARDSTICK.s1(0, 1.0) == 1.0
    assert YARDSTICK.s1(0, 1.25) == 0.75
    assert YARDSTICK.s1(0, math.inf) == -math.inf


def test_a_start_as_good_as_the_oracle_is_judged_by_a_thousandth_of_the_progress():
    good = ReferenceLosses("x", ("good",), (1.001,), 1.0, 5.0, {})
    assert good.s1(0, 1.0) == 1.0
    assert good.s1(0, 1.002) == pytest.approx(0.5)
    better = ReferenceLosses("x", ("better",), (0.999,), 1.0, 5.0, {})
    assert better.s1(0, 0.999) == 1.0


def test_a_default_that_diverges_is_beaten_by_whatever_trains():
    assert YARDSTICK.s1(1, 4.0) == 1.0
    assert YARDSTICK.s1(1, math.inf) == 0.0


def test_step_efficiency_lies_between_the_shares_that_were_tried():
    assert [YARDSTICK.step_efficiency(loss) for loss in (9.0, 1.8, 1.5, 1.2, 1.1, 1.0, 0.9)] == pytest.approx(
        [0.5, 0.5, 0.65, 0.8, 0.9, 1.0, 1.0]
    )


def test_a_score_counts_problems_and_starts():
    references = (YARDSTICK, ReferenceLosses("y", ("low", "high"), (2.0, 3.0), 1.0, 5.0, {0.5: 1.8}))
    score = Score.of([trial(1.05, 4.0), trial(1.15, 3.5)], references)
    assert (score.num_cases, score.num_at_least(0.9), score.num_at_least(0.8), score.num_harmed) == (4, 2, 3, 1)
    assert score.mean_s1 == pytest.approx((0.95 + 1.0 + 0.85 - 0.25) / 4)
    assert score.median_s1(0) == pytest.approx(0.9)
    assert score.mean_cost == pytest.approx(1.1)
    assert score.mean_gap == pytest.approx((0.0125 + 0.75 + 0.0375 + 0.625) / 4)


def with_runs(defaults: tuple[float, ...], oracles: tuple[float, ...]) -> ReferenceLosses:
    means = [sum(runs) / len(runs) for runs in (defaults, oracles)]
    return ReferenceLosses("z", ("only",), (means[0],), means[1], 5.0, {0.5: 1.8}, (defaults,), oracles)


def test_a_start_has_room_where_more_is_to_be_gained_than_noise():
    assert with_runs((2.0, 2.1, 1.9), (1.0, 1.1, 0.9)).has_room(0)  # paired: no noise at all in the difference
    assert not with_runs((1.1, 1.3, 0.9), (1.0, 1.0, 1.0)).has_room(0)  # 0.1, with a standard error of 0.12
    assert not with_runs((0.9, 0.8, 0.9), (1.0, 1.0, 1.0)).has_room(0)  # better than the oracle
    assert with_runs((math.inf, 2.0, 2.0), (1.0, 1.0, 1.0)).has_room(0)  # a default that diverges leaves all


def test_the_error_of_s1_is_that_of_a_ratio_over_seeds():
    reference = with_runs((2.0, 2.0), (1.0, 1.0))
    # S1 by seed is 0.5 and 0.7 here, whose mean has a standard error of 0.1.
    assert reference.s1_error(0, (1.5, 1.3)) == pytest.approx(0.1)
    assert math.isnan(YARDSTICK.s1_error(0, (1.5, 1.3)))


def test_harm_within_noise_is_told_from_harm_beyond_it():
    reference = with_runs((2.0, 2.0, 2.0), (1.0, 1.0, 1.0))
    scattered, steady = (
        Score.of([Trial("m", "x", (tuple(TrialRun(loss, 1.0, (), 0) for loss in losses),), 0.1)], [reference])
        for losses in ((1.0, 2.2, 3.2), (2.1, 2.2, 2.15))
    )
    assert (scattered.num_harmed, scattered.num_harmed_beyond_noise) == (1, 0)
    assert (steady.num_harmed, steady.num_harmed_beyond_noise) == (1, 1)


def test_only_starts_with_room_count_as_such():
    references = (with_runs((2.0, 2.0), (1.0, 1.0)), with_runs((1.0, 1.02), (1.0, 1.0)))
    both = Trial("m", "x", ((TrialRun(1.0, 1.0, (), 0),) * 2,), 0.1)
    score = Score.of([both, both], references)
    assert (score.num_at_least(0.9), score.num_solved_with_room, score.num_with_room) == (2, 1, 1)
