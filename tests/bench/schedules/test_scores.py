from __future__ import annotations

import math

import pytest

from clantune_scale.bench.schedules.scores import Score, Yardstick
from clantune_scale.bench.schedules.trial import Run, Trial

YARDSTICK = Yardstick("x", ("low", "high"), (2.0, math.inf), 1.0, 5.0, {0.5: 1.8, 0.8: 1.2})


def trial(*losses: float, method: str = "m", cost: float = 1.1) -> Trial:
    return Trial(method, "x", tuple((Run(loss, cost, (), 0),) for loss in losses), 0.1)


def test_s1_is_the_share_of_what_a_schedule_can_gain():
    assert YARDSTICK.s1(0, 2.0) == 0.0
    assert YARDSTICK.s1(0, 1.0) == 1.0
    assert YARDSTICK.s1(0, 1.25) == 0.75
    assert YARDSTICK.s1(0, math.inf) == -math.inf


def test_a_start_as_good_as_the_oracle_is_judged_by_a_thousandth_of_the_progress():
    good = Yardstick("x", ("good",), (1.001,), 1.0, 5.0, {})
    assert good.s1(0, 1.0) == 1.0
    assert good.s1(0, 1.002) == pytest.approx(0.5)
    better = Yardstick("x", ("better",), (0.999,), 1.0, 5.0, {})
    assert better.s1(0, 0.999) == 1.0


def test_a_default_that_diverges_is_beaten_by_whatever_trains():
    assert YARDSTICK.s1(1, 4.0) == 1.0
    assert YARDSTICK.s1(1, math.inf) == 0.0


def test_step_efficiency_lies_between_the_shares_that_were_tried():
    assert [YARDSTICK.step_efficiency(loss) for loss in (9.0, 1.8, 1.5, 1.2, 1.1, 1.0, 0.9)] == pytest.approx(
        [0.5, 0.5, 0.65, 0.8, 0.9, 1.0, 1.0]
    )


def test_a_score_counts_problems_and_starts():
    yardsticks = (YARDSTICK, Yardstick("y", ("low", "high"), (2.0, 3.0), 1.0, 5.0, {0.5: 1.8}))
    score = Score.of([trial(1.05, 4.0), trial(1.15, 3.5)], yardsticks)
    assert (score.num_cases, score.num_at_least(0.9), score.num_at_least(0.8), score.num_harmed) == (4, 2, 3, 1)
    assert score.mean_s1 == pytest.approx((0.95 + 1.0 + 0.85 - 0.25) / 4)
    assert score.median_s1(0) == pytest.approx(0.9)
    assert score.mean_cost == pytest.approx(1.1)
    assert score.mean_gap == pytest.approx((0.0125 + 0.75 + 0.0375 + 0.625) / 4)
