"""How members spread around the clan's centre, so that a parabola through their losses is well determined."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from clantune_scale.core import mutation

#: Seeded arrangements that are compared where several genes vary at once.
NUM_CANDIDATES = 16


def levels(population_size: int) -> np.ndarray:
    """[members] normal quantiles with mean 0 and variance 1, in ascending order.

    Plain normal draws, which the study used, have the same spread on average, but with four members
    they are lopsided or bunched more often than not, and the parabola's minimum is then extrapolated.
    Fixed quantiles are always centred and always as wide as asked; chance only deals them out.
    """
    quantile = NormalDist().inv_cdf
    z = np.array([quantile((m + 0.5) / population_size) for m in range(population_size)])
    z = (z - z[::-1]) / 2  # symmetric to the last bit
    return z / np.sqrt(np.mean(z**2)) if population_size > 1 else z


def spread(population_size: int, names: Sequence[str], *, seed: int, round_: int) -> np.ndarray:
    """[members, genes] standardised offsets: a permutation of :func:`levels` per gene.

    With several genes the permutation is the one, of a few seeded candidates, whose quadratic design
    has the largest determinant (D-optimality), because two genes dealt alike could not be told apart.
    """
    z = levels(population_size)
    candidates = [
        np.stack([z[list(_deal(population_size, name, seed, round_, attempt))] for name in names], axis=1)
        for attempt in range(NUM_CANDIDATES if len(names) > 1 else 1)
    ]
    return max(candidates, key=_log_determinant)


def design(x: np.ndarray, *, quadratic: bool) -> np.ndarray:
    """[members, 1 + genes (+ genes)]: the regressors 1, x_g and, if ``quadratic``, x_g^2."""
    columns = [np.ones((len(x), 1)), x] + ([x**2] if quadratic else [])
    return np.concatenate(columns, axis=1)


def _deal(population_size: int, name: str, seed: int, round_: int, attempt: int) -> tuple[int, ...]:
    return mutation.permutation(seed, round_, mutation.CLAN, f"spread:{name}:{attempt}", count=population_size)


def _log_determinant(x: np.ndarray) -> float:
    a = design(x, quadratic=True)
    sign, value = np.linalg.slogdet(a.T @ a)
    return float(value) if sign > 0 else -np.inf
