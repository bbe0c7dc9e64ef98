"""Fewer points that show the same, for a run that has more rounds or members than a page has pixels."""

from __future__ import annotations

import itertools

import numpy as np

#: Rounds up to which every value is drawn.
MAX_POINTS = 400
#: Members up to which each has a line of its own.
MAX_LINES = 8


def is_long(num_points: int) -> bool:
    """Whether a line of so many points is thinned."""
    return num_points > MAX_POINTS


def bins(num_points: int) -> np.ndarray:
    """First index of each stretch of points that is drawn as one; at most ``MAX_POINTS // 2`` stretches."""
    return np.unique(np.linspace(0, num_points, MAX_POINTS // 2, endpoint=False).astype(int))


def thin_line(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A line's lowest and highest point in every stretch, in their order.

    No peak is lost: all points, drawn on as many pixels, would look the same. A short line is returned as it is. A
    stretch without a finite value keeps one point, so that the gap shows.

    Args:
        x: [points], increasing.
        y: [points], nan if there is no value.
    """
    if not is_long(len(x)):
        return x, y
    keep: list[int] = []
    edges = [*bins(len(x)), len(x)]
    for first, after in itertools.pairwise(edges):
        finite = first + np.flatnonzero(np.isfinite(y[first:after]))
        ends = (finite[np.argmin(y[finite])], finite[np.argmax(y[finite])]) if len(finite) else (first,)
        keep += sorted({int(index) for index in ends})
    return x[keep], y[keep]


def thin_band(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A band's envelope: the lowest ``low`` and the highest ``high`` of every stretch, at the stretch's first x.

    Args:
        x, low, high: [points]; nan if there is no value.
    """
    if not is_long(len(x)):
        return x, low, high
    first = bins(len(x))
    return x[first], np.fmin.reduceat(low, first), np.fmax.reduceat(high, first)


def quantiles(values: np.ndarray) -> dict[str, np.ndarray]:
    """Lowest, tenth, median, ninetieth and highest of the members' finite values in every round.

    Args:
        values: [R, M].

    Returns:
        By name, [R]; nan in a round without a finite value.
    """
    sane = np.where(np.isfinite(values), values, np.nan)
    filled = np.isfinite(sane).any(axis=1)
    found = np.full((5, len(values)), np.nan)
    found[:, filled] = np.nanquantile(sane[filled], (0.0, 0.1, 0.5, 0.9, 1.0), axis=1)
    return dict(zip(("lowest", "tenth", "median", "ninetieth", "highest"), found, strict=True))
