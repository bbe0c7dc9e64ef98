"""Thinning keeps every peak, every gap and every end."""

from __future__ import annotations

import numpy as np
import pytest

from clantune_scale.tracking.report import thin

LONG = 10 * thin.MAX_POINTS


def test_short_lines_come_back_as_they_are():
    x, y = np.arange(thin.MAX_POINTS), np.arange(thin.MAX_POINTS)
    assert thin.thin_line(x, y)[0] is x and thin.thin_band(x, y, y)[1] is y


def test_a_single_peak_survives():
    y = np.zeros(LONG)
    y[1234], y[3210] = 5.0, -7.0
    x, thinned = thin.thin_line(np.arange(LONG), y)
    assert len(x) <= thin.MAX_POINTS and (np.diff(x) > 0).all()
    assert thinned[x == 1234] == 5.0 and thinned[x == 3210] == -7.0


def test_a_gap_stays_a_gap():
    y = np.ones(LONG)
    y[1000:2000] = np.nan
    x, thinned = thin.thin_line(np.arange(LONG), y)
    assert np.isnan(thinned[(x >= 1000) & (x < 2000)]).all() and np.isnan(thinned).any()
    assert (thinned[x < 1000] == 1).all()


def test_a_band_contains_all_that_it_stands_for():
    random = np.random.default_rng(0)
    low = random.normal(size=LONG)
    x, bottom, top = thin.thin_band(np.arange(LONG), low, low + 1)
    assert len(x) == thin.MAX_POINTS // 2
    for first, after, lowest, highest in zip(x, [*x[1:], LONG], bottom, top, strict=True):
        assert lowest == low[first:after].min() and highest == low[first:after].max() + 1


def test_quantiles_leave_out_members_that_diverged():
    values = np.array([[1.0, 2.0, 3.0, np.inf], [np.nan, np.nan, np.inf, np.nan]])
    found = thin.quantiles(values)
    assert [found[name][0] for name in ("lowest", "median", "highest")] == pytest.approx([1.0, 2.0, 3.0])
    assert all(np.isnan(line[1]) for line in found.values())
