from __future__ import annotations

from itertools import pairwise

import pytest

from clantune_scale.core.schedule import ClanSchedule, Segment
from clantune_scale.core.stretch import rate_factor, stretched
from clantune_scale.errors import ConfigError

SCHEDULE = ClanSchedule(
    ({"name": "lr", "bounds": [0.1, 10], "relative": True},),
    (Segment(0, 10, {"lr": 2.0}), Segment(10, 11, {"lr": 3.0}), Segment(11, 20, {"lr": 4.0}, (1.0, 0.0))),
)


def test_boundaries_keep_their_share_of_the_run():
    longer = stretched(SCHEDULE, num_steps=40)
    assert [(s.start_step, s.end_step) for s in longer.segments] == [(0, 20), (20, 22), (22, 40)]
    assert [longer.value_at("lr", step) for step in (19, 20, 22)] == [2.0, 3.0, 4.0]
    assert longer.lr_factor_at(31) == pytest.approx(0.5)


def test_a_segment_of_less_than_half_a_step_vanishes_without_a_gap():
    shorter = stretched(SCHEDULE, num_steps=4)
    ends = [(s.start_step, s.end_step) for s in shorter.segments]
    assert ends[0][0] == 0 and ends[-1][1] == 4
    assert all(before[1] == after[0] for before, after in pairwise(ends))
    assert len(ends) == 2


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("sqrt", 2.0), ("linear", 4.0)])
def test_rates_follow_the_batch_by_the_rule_that_was_named(rule, factor):
    assert rate_factor(rule, old_batch=32, new_batch=128) == factor
    scaled = stretched(SCHEDULE, factor=factor)
    assert scaled.rate_factor == factor and stretched(scaled, factor=3.0).rate_factor == 3 * factor
    assert scaled.segments == SCHEDULE.segments  # the decay's share is 1 until it starts, whatever the batch


def test_what_cannot_be_stretched_is_refused():
    with pytest.raises(ConfigError, match="stretched to 0 steps"):
        stretched(SCHEDULE, num_steps=0)
    with pytest.raises(ConfigError, match="the learning-rate rule is 'cubic'. Choose from: none, sqrt, linear"):
        rate_factor("cubic", old_batch=1, new_batch=2)
    with pytest.raises(ConfigError, match="from 32 to 0 samples"):
        rate_factor("sqrt", old_batch=32, new_batch=0)
