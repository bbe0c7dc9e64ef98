"""Members' perturbations around the clan's centre, chosen so that a parabola through their losses is determined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from clantune_scale.core import mutation
from clantune_scale.core.strategies.clan.least_squares import independence

#: Seeded arrangements that are compared if several genes vary at once.
NUM_CANDIDATES = 16


def levels(population_size: int) -> np.ndarray:
    """[members] normal quantiles with mean 0 and variance 1, in ascending order.

    Plain normal draws, which the study used, have the same variance on average. But with four members they
    are lopsided or bunched more often than not, and the parabola's minimum is then extrapolated. Fixed
    quantiles are always centred and always as wide as asked. Chance only deals them out.
    """
    quantile = NormalDist().inv_cdf
    drawn = np.array([quantile((m + 0.5) / population_size) for m in range(population_size)])
    z: np.ndarray = (drawn - drawn[::-1]) / 2  # symmetric to the last bit
    if population_size > 1:
        z /= math.sqrt(math.fsum(z * z) / population_size)
    return z


def perturbations(population_size: int, names: Sequence[str], *, seed: int, round_: int) -> np.ndarray:
    """[members, genes] standardised offsets: a permutation of :func:`levels` per gene.

    With several genes the permutation is the one, of a few seeded candidates, whose quadratic design
    has the largest determinant (D-optimality), because two genes dealt alike could not be told apart.
    """
    z = levels(population_size)
    candidates = [
        np.stack([z[list(_deal(population_size, name, seed, round_, attempt))] for name in names], axis=1)
        for attempt in range(NUM_CANDIDATES if len(names) > 1 else 1)
    ]
    chosen: np.ndarray = max(candidates, key=_volume)
    return chosen


def regressors(x: np.ndarray, *, quadratic: bool) -> list[list[float]]:
    """Columns [members] of the model: 1, each x_g and, if ``quadratic``, each x_g^2, for ``x`` [members, genes]."""
    return [[1.0] * len(x), *x.T.tolist(), *((x * x).T.tolist() if quadratic else [])]


def _deal(population_size: int, name: str, seed: int, round_: int, attempt: int) -> tuple[int, ...]:
    return mutation.permutation(seed, round_, mutation.CLAN, f"spread:{name}:{attempt}", count=population_size)


def _volume(x: np.ndarray) -> float:
    """Grows with the determinant of the quadratic design, whose columns have one length in all candidates."""
    return math.prod(independence(regressors(x, quadratic=True)))
