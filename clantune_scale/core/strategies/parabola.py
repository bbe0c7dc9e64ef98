"""From members' losses to the move of the clan's centre: least squares of a parabola per explored gene."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clantune_scale.core.strategies.least_squares import least_squares
from clantune_scale.core.strategies.spread import regressors


@dataclass(frozen=True)
class Move:
    """What a round says about one gene.

    Attributes:
        change: of the clan's centre, in scale units.
        why: a short phrase for the log.
    """

    change: float
    why: str


def fit_moves(offsets: np.ndarray, losses: np.ndarray, max_changes: Sequence[float]) -> tuple[Move, ...]:
    """The move of each explored gene, each at most its ``max_change`` either way.

    Losses are fitted by f = a + sum_g (b_g x_g + c_g x_g^2). A gene moves to its parabola's minimum
    -b / 2c where that is convex, and else downhill by its largest change. With too few members for a
    parabola, it moves downhill as far as the members reached; with too few for a slope, not at all.

    Args:
        offsets: [members, genes] float64, members' distance from the centre in scale units.
        losses: [members] float64; members with a loss that is not finite are left out.
        max_changes: [genes], in scale units.
    """
    finite = np.isfinite(losses)
    x, f = offsets[finite], losses[finite]
    moves = [Move(0.0, f"no decision: {len(f)} finite members are too few")] * offsets.shape[1]
    if len(f) < 2:
        return tuple(moves)
    if np.ptp(f) == 0:
        return tuple(Move(0.0, "no decision: all losses are equal") for _ in moves)
    reach = np.abs(x).max(axis=0)
    varied = np.flatnonzero(np.ptp(x, axis=0) > 1e-9)
    for gene in set(range(len(moves))) - set(varied.tolist()):
        moves[gene] = Move(0.0, "no decision: members did not differ")
    if len(varied):
        slopes, curvatures = _coefficients(x[:, varied] / reach[varied], f)
        for gene, slope, curvature in zip(varied.tolist(), slopes, curvatures, strict=True):
            moves[gene] = _move(slope, curvature, float(reach[gene]), max_changes[gene])
    return tuple(moves)


def _coefficients(u: np.ndarray, f: np.ndarray) -> tuple[list[float], list[float]]:
    """Slopes and curvatures [genes] of the best model that is determined; nan where it has none."""
    num_genes = u.shape[1]
    unknown = [math.nan] * num_genes
    y = (f - f[0]).tolist()  # what members share is a's to explain, and would cost the others' last digits
    for quadratic in (True, False):
        solution = least_squares(regressors(u, quadratic=quadratic), y)
        if solution:
            return solution[1 : 1 + num_genes], solution[1 + num_genes :] if quadratic else unknown
    return unknown, unknown


def _move(slope: float, curvature: float, reach: float, max_change: float) -> Move:
    """A move from coefficients in units of ``reach``."""
    if math.isnan(slope):
        return Move(0.0, "no decision: members are too few to tell genes apart")
    if slope == 0 and not curvature > 0:
        return Move(0.0, "no decision: level")
    if math.isnan(curvature):
        return Move(-math.copysign(min(reach, max_change), slope), "slope")
    if curvature > 0:
        minimum = -slope / (2 * curvature) * reach
        if abs(minimum) <= max_change:
            return Move(minimum, "minimum")
        return Move(math.copysign(max_change, minimum), "towards a distant minimum")
    return Move(-math.copysign(max_change, slope), "downhill")
