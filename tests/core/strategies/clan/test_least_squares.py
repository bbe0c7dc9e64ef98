from __future__ import annotations

import numpy as np
import pytest

from clantune_scale.core.strategies.clan.least_squares import independence, least_squares


def test_it_agrees_with_lapack():
    rng = np.random.default_rng(0)
    for members, regressors in ((4, 3), (8, 7), (32, 15)):
        a, y = rng.standard_normal((members, regressors)), rng.standard_normal(members)
        expected = np.linalg.lstsq(a, y, rcond=None)[0]
        assert least_squares(a.T.tolist(), y.tolist()) == pytest.approx(expected, rel=1e-9)


def test_what_is_not_determined_has_no_solution():
    x = [1.0, 2.0, 4.0]
    assert least_squares([x, [2 * value for value in x]], [1.0, 2.0, 3.0]) is None
    assert least_squares([x, [0.0, 0.0, 0.0]], [1.0, 2.0, 3.0]) is None
    assert least_squares([[1.0], [2.0]], [3.0]) is None


def test_independence_is_the_sine_of_the_angle_to_the_columns_before():
    assert independence([[2.0, 0.0], [3.0, 3.0]]) == pytest.approx([1.0, 0.5**0.5])


def test_equal_arithmetic_gives_equal_bits():
    columns = [[1.0] * 4, [-0.13, -0.04, 0.04, 0.13], [0.0169, 0.0016, 0.0016, 0.0169]]
    y = [3.1, 2.9, 2.8, 2.75]
    # Pinned: plain IEEE arithmetic has one answer, on any processor.
    assert [value.hex() for value in least_squares(columns, y)] == [
        "0x1.6bcbcbcbcbcbdp+1",
        "-0x1.567c8a60dd681p+0",
        "0x1.39b9b9b9b9b89p+2",
    ]
