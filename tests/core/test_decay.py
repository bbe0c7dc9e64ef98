from __future__ import annotations

import math

import pytest

from clantune_scale.core import decay


def test_the_line_is_one_up_to_the_start_and_zero_from_the_end_on():
    steps = (0, 4, 6, 9, 10, 12)
    assert [decay.line(step, start_step=4, total_steps=10) for step in steps] == [1, 1, 4 / 6, 1 / 6, 0, 0]


def cosine(step: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / 10))


# Steps 4 to 10 of a run of 10 that decays from step 4: what the user's schedule says, and the rates by hand.
SCHEDULES = {
    "constant": ([0.3] * 7, [0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0.0]),
    # 0.654509 x (1, 5/6, 4/6, 3/6, 2/6, 1/6, 0) against 0.654509, 0.5, 0.345492, 0.206107, 0.095492, 0.024472, 0:
    # below the line throughout, and never decayed twice.
    "cosine": ([cosine(step) for step in range(4, 11)], [cosine(step) for step in range(4, 11)]),
    # The line while the rate stays, and in the end its own fall where that is below: 1/3 against 0.2, 1/6 against 0.1.
    "wsd": ([1, 1, 1, 1, 0.2, 0.1, 0], [1, 5 / 6, 4 / 6, 3 / 6, 0.2, 0.1, 0]),
    "zero at the freeze": ([0, 0.1, 0.1, 0, 0, 0, 0], [0.0] * 7),
    "rising": ([0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0], [0.1, 0.5 / 6, 0.4 / 6, 0.05, 0.2 / 6, 0.1 / 6, 0.0]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_rate_is_the_smaller_of_the_users_own_and_the_line(name):
    scheduled, wanted = SCHEDULES[name]
    factors = [decay.line(step, start_step=4, total_steps=10) for step in range(4, 11)]
    pairs = zip(factors, scheduled, strict=True)
    rates = [own * decay.under_ceiling(factor, reference=scheduled[0], scheduled=own) for factor, own in pairs]
    assert rates == pytest.approx(wanted)


def test_a_rate_that_has_not_moved_takes_the_factor_to_the_last_bit():
    for factor in (1.0, 5 / 6, 1 / 3, 0.0):
        assert decay.under_ceiling(factor, reference=0.1, scheduled=0.1) == factor
