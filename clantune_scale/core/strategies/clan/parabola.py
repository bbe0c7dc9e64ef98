"""From members' losses to the move of the clan's centre: least squares of a parabola per explored gene."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from clantune_scale.core.fitness import mean_and_error
from clantune_scale.core.strategies.clan.least_squares import least_squares
from clantune_scale.core.strategies.clan.perturbations import regressors


@dataclass(frozen=True)
class Move:
    """What a round says about one gene.

    Attributes:
        change: of the clan's centre, in scale units.
        why: a short phrase for the log.
    """

    change: float
    why: str


def fit_moves(
    offsets: np.ndarray,
    losses: np.ndarray,
    max_changes: Sequence[float],
    *,
    is_rate: Sequence[bool] = (),
    caution: float = 0.0,
) -> tuple[Move, ...]:
    """The move of each explored gene, each at most its ``max_change`` either way.

    Losses are fitted by f = a + sum_g (b_g x_g + c_g x_g^2). A gene moves to its parabola's minimum
    -b / 2c if that is convex, and else downhill by its largest change. With too few members for a
    parabola, it moves downhill as far as the members reached; with too few for a slope, not at all.

    Members that share gradients and differ in learning rate lie on a line, at k = exp(x) times one
    displacement, and along it the loss is nearly quadratic in k, not in x. Upward a parabola in x
    over-reaches then, so a learning rate rises to the minimum over k if that is the nearer one.

    Args:
        offsets: [members, genes] float64, members' distance from the centre in scale units.
        losses: [members] or [members, batches] float64; members with a loss that is not finite are left out.
        max_changes: [genes], in scale units.
        is_rate: [genes], whether the gene is the logarithm of a factor on the displacement; empty if none is.
        caution: standard errors over the batches that are added to a curvature, and that a slope must exceed
            to be taken at more than half its length; 0 takes both as they are.
    """
    losses = losses.reshape(len(losses), -1)
    finite = np.isfinite(losses).all(axis=1)
    x, f = offsets[finite], losses[finite]
    moves = [Move(0.0, f"no decision: {len(f)} finite members are too few")] * offsets.shape[1]
    if len(f) < 2:
        return tuple(moves)
    if np.ptp(f.mean(axis=1)) == 0:
        return tuple(Move(0.0, "no decision: all losses are equal") for _ in moves)
    reach = np.abs(x).max(axis=0)
    varied = np.flatnonzero(np.ptp(x, axis=0) > 1e-9)
    for gene in set(range(len(moves))) - set(varied.tolist()):
        moves[gene] = Move(0.0, "no decision: members did not differ")
    if len(varied):
        for gene, fit in zip(varied.tolist(), _fits(x[:, varied] / reach[varied], f), strict=True):
            along = any(is_rate[gene : gene + 1])
            moves[gene] = _move(fit.cautious(caution), float(reach[gene]), max_changes[gene], is_rate=along)
    return tuple(moves)


def move_of(slopes: Sequence[float], curvatures: Sequence[float], max_change: float, *, caution: float = 0.0) -> Move:
    """The move of a learning rate whose slope and curvature are known by batch.

    Args:
        slopes: [batches] first derivatives by the logarithm of the rate.
        curvatures: [batches] half the second ones.
        max_change: largest move either way.
        caution: as for :func:`fit_moves`.
    """
    fit = _Fit(*mean_and_error(slopes), *mean_and_error(curvatures)).cautious(caution)
    return _move(fit, 1.0, max_change, is_rate=True)


@dataclass(frozen=True)
class _Fit:
    """One gene's coefficients in units of its reach, with standard errors; nan if they are not determined."""

    slope: float
    slope_error: float
    curvature: float
    curvature_error: float

    def cautious(self, caution: float) -> _Fit:
        """With less slope and more curvature, by as much as noise may have added."""
        if not caution or math.isnan(self.slope):
            return self
        error = caution * self.slope_error
        share = 1.0 if error == 0 else self.slope**2 / (self.slope**2 + error**2)
        curvature = self.curvature
        if not math.isnan(curvature):
            curvature = max(curvature, 0.0) + caution * self.curvature_error
        return replace(self, slope=share * self.slope, curvature=curvature)


def _fits(u: np.ndarray, f: np.ndarray) -> list[_Fit]:
    """By gene, the best model that is determined, from ``u`` [members, genes] and ``f`` [members, batches]."""
    num_genes = u.shape[1]
    unknown = _Fit(math.nan, 0.0, math.nan, 0.0)
    # The intercept explains what members share. Left in, it would cost the other coefficients' last digits.
    batches = (f - f[0]).T.tolist()
    for quadratic in (True, False):
        columns = regressors(u, quadratic=quadratic)
        # Whether coefficients are determined depends on the columns only: on all batches, or on none.
        found = [least_squares(columns, batch) for batch in batches]
        solutions = [solution for solution in found if solution]
        if solutions:
            slopes = [mean_and_error([s[1 + gene] for s in solutions]) for gene in range(num_genes)]
            if not quadratic:
                return [_Fit(*slope, math.nan, 0.0) for slope in slopes]
            curvatures = [mean_and_error([s[1 + num_genes + gene] for s in solutions]) for gene in range(num_genes)]
            return [_Fit(*slope, *curvature) for slope, curvature in zip(slopes, curvatures, strict=True)]
    return [unknown] * num_genes


def _move(fit: _Fit, reach: float, max_change: float, *, is_rate: bool) -> Move:
    """A move from coefficients in units of ``reach``."""
    slope, curvature = fit.slope, fit.curvature
    if math.isnan(slope):
        return Move(0.0, "no decision: members are too few to tell genes apart")
    if slope == 0 and not curvature > 0:
        return Move(0.0, "no decision: level")
    if math.isnan(curvature):
        return Move(-math.copysign(min(reach, max_change), slope), "slope")
    minimum = -slope / (2 * curvature) * reach if curvature > 0 else -math.copysign(math.inf, slope)
    if is_rate:
        minimum = min(minimum, minimum_along_the_line(slope / reach, curvature / reach**2), key=abs)
    if abs(minimum) <= max_change:
        return Move(minimum, "minimum")
    return Move(math.copysign(max_change, minimum), "towards a distant minimum" if curvature > 0 else "downhill")


def minimum_along_the_line(slope: float, curvature: float) -> float:
    """log k at the minimum of a parabola in k = learning rate / centre, from the loss's fit in log k.

    Args:
        slope: first derivative by log k at k = 1, and so by k.
        curvature: half the second by log k; the second by k is 2 curvature - slope.

    Returns:
        The minimum. Infinitely far downhill if there is none, or if k would not be above 0.
    """
    second = 2 * curvature - slope
    if second <= 0:
        return -math.copysign(math.inf, slope)
    k = 1 - slope / second
    return math.log(k) if k > 0 else -math.inf
