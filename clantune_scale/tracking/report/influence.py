"""What a run says about a gene: how far it moved, whether members' losses followed it, whether a bound stopped it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clantune_scale.core.genome import Gene
from clantune_scale.tracking.report.series import Run

# By chance a line explains half of the differences among three members, and all of those between two.
_MIN_MEMBERS = 4
_MIN_ROUNDS = 3
# After ten thousand rounds even a trace of an effect would be significant. A smaller share does not matter.
_MATTERS = 0.05


@dataclass(frozen=True)
class Influence:
    """One gene over one run.

    Attributes:
        first: every member's value before the first round.
        last: the clan's value after the last decision.
        moves: [decisions] changes of the clan's value while members might differ, scale units.
        explained: share of the differences in loss between members that goes with their differences in this gene, mean
            over rounds; None if there are too few members or rounds. It is the squared Pearson correlation. That is a
            straight line, so a gene at its optimum shows little.
        chance: what unrelated numbers would give, 1 / (members - 1).
        is_clear: whether ``explained`` is above chance by more than two standard errors over the rounds, and by at
            least 0.05.
        at_low: share of the members' rounds in which the gene was at its lower bound (within 1 % of the range).
        at_high: the same for the upper bound.
    """

    first: float
    last: float
    moves: np.ndarray
    explained: float | None
    chance: float
    is_clear: bool
    at_low: float
    at_high: float

    @property
    def path(self) -> float:
        """Sum of the moves' lengths, scale units."""
        return float(np.abs(self.moves).sum())


def influence(run: Run, gene: Gene) -> Influence:
    """What the run says about ``gene``."""
    encode = np.vectorize(gene.encode, otypes=[float])
    consensus = encode(run.consensus[gene.name])
    frozen = run.frozen_round
    moves = np.diff(consensus[: None if frozen is None else frozen + 1])
    values = encode(run.values[gene.name])
    low, high = (gene.encode(bound) for bound in gene.bounds)
    margin = 0.01 * (high - low)
    exploring = values[: frozen if frozen is not None else None]
    shares = _explained(exploring, run.loss[: len(exploring)])
    error = _standard_error(shares) if len(shares) >= _MIN_ROUNDS else np.inf
    chance = 1.0 / max(run.num_members - 1, 1)
    return Influence(
        first=gene.initial,
        last=float(run.consensus[gene.name][-1 if frozen is None else frozen]),
        moves=moves,
        explained=float(shares.mean()) if len(shares) >= _MIN_ROUNDS else None,
        chance=chance,
        is_clear=len(shares) >= _MIN_ROUNDS and float(shares.mean()) - max(2 * error, _MATTERS) > chance,
        at_low=float((values <= low + margin).mean()),
        at_high=float((values >= high - margin).mean()),
    )


def _standard_error(series: np.ndarray) -> float:
    """Of the mean of a series. Members keep their genomes from round to round, so neighbours are correlated.

    For a first-order autoregressive series the variance of the mean grows by (1 + r) / (1 - r), where r is the
    correlation of neighbours.
    """
    off = series - series.mean()
    correlation = float((off[1:] * off[:-1]).sum() / max((off**2).sum(), 1e-12))
    inflation = (1 + min(max(correlation, 0.0), 0.95)) / (1 - min(max(correlation, 0.0), 0.95))
    return float(series.std(ddof=1) * np.sqrt(inflation / len(series)))


def _explained(values: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Squared correlation over members, for every round in which both differ.

    Args:
        values: [R, M] the gene, scale units.
        loss: [R, M].
    """
    if values.shape[1] < _MIN_MEMBERS:
        return np.empty(0)
    usable = np.isfinite(loss).all(axis=1)
    x = values[usable] - values[usable].mean(axis=1, keepdims=True)
    y = loss[usable] - loss[usable].mean(axis=1, keepdims=True)
    spread = (x**2).sum(axis=1) * (y**2).sum(axis=1)
    # If members do not differ, the subtraction leaves only rounding errors.
    differ = ((x**2).sum(axis=1) > 1e-16) & ((y**2).sum(axis=1) > 1e-24)
    return (x * y).sum(axis=1)[differ] ** 2 / spread[differ]
