"""Least squares for a handful of members, to the same last bit on every host.

LAPACK picks its kernels by processor, so that two hosts of one clan may solve the same system to
different last bits, and then disagree about a decision. Plain Python arithmetic with exactly rounded
sums does not; the systems have a few dozen entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul

Column = Sequence[float]

#: Smallest share of a regressor that the ones before it must leave unexplained. Members well apart leave a tenth
#: and more. Bunched ones (reflected at a bound, rounded to one whole number) leave next to nothing.
MIN_INDEPENDENCE = 1e-3


def independence(columns: Sequence[Column]) -> list[float]:
    """For each column, the share of its norm that is orthogonal to the columns before it."""
    _, triangle = _orthogonalized(columns)
    return [triangle[k][k] / _norm(column) if any(column) else 0.0 for k, column in enumerate(columns)]


def least_squares(columns: Sequence[Column], y: Column) -> list[float] | None:
    """The coefficients that minimize ``|sum_k coefficient_k column_k - y|``, or None if they are not determined.

    Args:
        columns: regressors, each [members].
        y: [members].
    """
    if len(y) < len(columns) or min(independence(columns)) < MIN_INDEPENDENCE:
        return None
    basis, triangle = _orthogonalized(columns)
    coefficients = [0.0] * len(columns)
    for k in reversed(range(len(columns))):
        known = [triangle[k][j] * coefficients[j] for j in range(k + 1, len(columns))]
        coefficients[k] = math.fsum([_dot(basis[k], y), *(-term for term in known)]) / triangle[k][k]
    return coefficients


def _orthogonalized(columns: Sequence[Column]) -> tuple[list[list[float]], list[list[float]]]:
    """Modified Gram-Schmidt: orthonormal columns, and the upper triangle that makes the given ones of them."""
    basis: list[list[float]] = []
    triangle = [[0.0] * len(columns) for _ in columns]
    for k, column in enumerate(columns):
        rest = list(column)
        for j, direction in enumerate(basis):
            triangle[j][k] = _dot(direction, rest)
            rest = [value - triangle[j][k] * along for value, along in zip(rest, direction, strict=True)]
        triangle[k][k] = _norm(rest)
        basis.append([value / triangle[k][k] for value in rest] if triangle[k][k] else rest)
    return basis, triangle


def _dot(a: Column, b: Column) -> float:
    return math.fsum(map(mul, a, b))


def _norm(a: Column) -> float:
    return math.sqrt(_dot(a, a))
