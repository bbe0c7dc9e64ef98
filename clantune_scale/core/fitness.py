"""From per-batch losses on a common window to a mean per member, its standard error, and a ranking."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Slopes:
    """How the loss changes with each group's learning rate, at the points of two members.

    Attributes:
        members: whose points.
        by_gene: [points, batches] each: the derivative of a batch's loss by the logarithm of the gene.
    """

    members: tuple[int, int]
    by_gene: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Fitness:
    """The clan's losses on the common validation window; lower is fitter.

    Attributes:
        losses: [members, batches] float64, the same batches for every member; not finite if a member's forward pass
            was not.
        training_loss: mean over the round's steps and the members; None if it is not known.
        slopes: of the genes that the round's plan names; None if it names none.
    """

    losses: np.ndarray
    training_loss: float | None = None
    slopes: Slopes | None = None

    @classmethod
    def from_losses(
        cls, losses: Sequence[Sequence[float]] | np.ndarray, *, training_loss: float | None = None
    ) -> Fitness:
        """Builds it from anything that has the shape [members, batches].

        Raises:
            ValueError: if the array does not have two axes or has no batch.
        """
        array = np.asarray(losses, dtype=np.float64)
        if array.ndim != 2 or array.shape[1] < 1:
            raise ValueError(f"losses must have the shape [members, batches >= 1], got {list(array.shape)}")
        return cls(array, training_loss)

    @property
    def num_members(self) -> int:
        """Members that were measured."""
        return len(self.losses)

    @property
    def is_finite(self) -> np.ndarray:
        """[members] bool: every batch's loss is a finite number."""
        finite: np.ndarray = np.isfinite(self.losses).all(axis=1)
        return finite

    @property
    def mean(self) -> np.ndarray:
        """[members] float64: mean loss; +inf for a member with any batch that is not finite."""
        finite = self.is_finite
        safe = np.where(finite[:, None], self.losses, 0.0)
        return np.where(finite, safe.mean(axis=1), np.inf)

    @property
    def standard_error(self) -> np.ndarray:
        """[members] float64: standard error of the mean over batches (nan for one batch or a non-finite loss)."""
        finite = self.is_finite
        if self.losses.shape[1] < 2:
            return np.full(self.num_members, np.nan)
        safe = np.where(finite[:, None], self.losses, 0.0)
        return np.where(finite, stats.sem(safe, axis=1), np.nan)

    @property
    def ranking(self) -> tuple[int, ...]:
        """Members from fittest to weakest; ties and members with a mean of +inf are ordered by index."""
        return tuple(int(m) for m in np.argsort(self.mean, kind="stable"))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (0 for one value), by exactly rounded sums, so that all hosts agree."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
