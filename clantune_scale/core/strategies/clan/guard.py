"""When a round is rolled back: it lost more ground than noise explains, or training blew up.

A lower learning rate is the only remedy that a rollback brings, and it stays for the rest of the run. So the guard asks
three questions. Is the loss worse by more than the noise of this run's own validation window? Does the training loss
agree, or does training still make progress? Did the last rollbacks help? A validation loss above the first one proves
nothing by itself. It rises during a long warm-up, while training continues from a trained model, and if a model has to
learn before it generalizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from clantune_scale.core.fitness import Fitness, mean_and_error

#: Standard errors of a difference beyond which it is taken for one.
SURE = 2.0
#: Share of a loss that stands for its standard error if it is of one batch, which shows none.
UNKNOWN_ERROR = 0.005
#: By what share of its height a training loss rises in a blow-up, and in one from which no training goes on.
BLOWN_UP, RUINED = 0.25, 10.0
#: Rounds in a row that lose ground before the clan is rolled back. A single one may have lost it by chance, and a
#: rollback lowers learning rates for the rest of the run. A blow-up does not wait.
LOST_IN_A_ROW = 2
#: Rollbacks before there is progress again. What two lower learning rates did not mend was not their fault.
MAX_ROLLBACKS = 2
#: From ruined states the clan is rolled back as long as each lower learning rate at least halves the rise.
MENDED = 0.5


@dataclass(frozen=True)
class Verdict:
    """What the guard says of a round.

    Attributes:
        has_lost_ground: its best member is worse than the best round by more than is tolerated.
        is_undone: the clan is rolled back.
        is_rates_fault: False if the round lost ground while training kept what it had gained.
        guard: as it is after the round.
    """

    has_lost_ground: bool
    is_undone: bool
    is_rates_fault: bool
    guard: Guard


@dataclass(frozen=True)
class Guard:
    """What the guard remembers; immutable, and plain data once it is in memory.

    Attributes:
        initial: [batches] validation losses before the first step.
        best: by kind of round, [batches] losses of the best member of the best round.
        marks: by kind of round, the best mean loss when the last progress ended in a rollback; empty before one.
        first_training: training loss of the first round that lost no ground; None if none is known.
        lowest_training: of all rounds.
        lost_rounds: rounds in a row that lost ground.
        rollbacks: since the last progress.
        last_rise: of the training loss in the round that was rolled back last (see :meth:`_rise`); None if it was
            not finite or is not known.
    """

    initial: tuple[float, ...]
    best: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    marks: Mapping[str, float] = field(default_factory=dict)
    first_training: float | None = None
    lowest_training: float | None = None
    lost_rounds: int = 0
    rollbacks: int = 0
    last_rise: float | None = None

    @classmethod
    def of(cls, start: Fitness) -> Guard:
        """Before the first step, from losses of which at least one member's are finite."""
        return cls(_best_of(start))

    @classmethod
    def from_memory(cls, memory: Mapping[str, Any]) -> Guard:
        """The guard that :meth:`to_memory` wrote, through JSON or not."""
        best = {kind: tuple(losses) for kind, losses in memory["best"].items()}
        return cls(**{**memory, "initial": tuple(memory["initial"]), "best": best})

    def to_memory(self) -> dict[str, Any]:
        """Plain data that JSON gives back as it was."""
        best = {kind: list(losses) for kind, losses in self.best.items()}
        return {**asdict(self), "initial": list(self.initial), "best": best}

    @property
    def initial_loss(self) -> float:
        """Mean validation loss before the first step."""
        return mean_and_error(self.initial)[0]

    def best_loss(self, kind: str) -> float:
        """Mean loss of the best round of that kind; the initial one before there is one."""
        return mean_and_error(self.best.get(kind, self.initial))[0]

    def judge(self, fitness: Fitness, *, kind: str, share: float, training: float | None, holds: bool) -> Verdict:
        """What follows from a round.

        Args:
            fitness: at its end.
            kind: rounds are compared with their like.
            share: the share of the progress so far that may be lost.
            training: the clan's training loss in the round; None if it is not known, or not the whole clan's.
            holds: whether lost ground is no reason to roll back. Lower learning rates do not mend overfitting.
        """
        training = training if training is not None and math.isfinite(training) else None
        is_finite = math.isfinite(float(fitness.mean.min()))
        own = _best_of(fitness) if is_finite else None
        is_lost = own is None or self._is_lost(own, kind, share)
        gets_on = self._gets_on(training, share)
        lost_rounds = self.lost_rounds + 1 if is_lost else 0
        rise = self._rise(training)
        is_bad = rise > BLOWN_UP or (lost_rounds >= LOST_IN_A_ROW and not holds and not gets_on)
        mends = self.last_rise is None or rise < MENDED * self.last_rise
        may_lower = self.rollbacks < MAX_ROLLBACKS or (rise > RUINED and mends)
        is_undone = not is_finite or (is_lost and is_bad and may_lower)
        after = replace(self._with_training(training, is_lost=is_lost), lost_rounds=lost_rounds)
        if is_undone:
            marks = self.marks or {name: self.best_loss(name) for name in {*self.best, kind}}
            rollbacks, last_rise = self.rollbacks + 1, rise if is_finite and training is not None else None
            after = replace(after, marks=marks, rollbacks=rollbacks, last_rise=last_rise)
        elif own is not None:
            after = after._with_best(own, kind, share)
        return Verdict(is_lost, is_undone, not (is_lost and gets_on), after)

    def _is_lost(self, own: Sequence[float], kind: str, share: float) -> bool:
        reference = self.best.get(kind, self.initial)
        difference, error = paired(own, reference)
        progress = max(0.0, self.initial_loss - self.best_loss(kind))
        return difference > max(share * progress, SURE * error)

    def _gets_on(self, training: float | None, share: float) -> bool:
        """Whether training keeps what it gained, but for ``share`` of it. Then no lower learning rate is needed."""
        if training is None:
            return False
        gained = self._first - min(training, self._lowest)
        return gained > 0 and training <= self._first - (1 - share) * gained

    @property
    def _first(self) -> float:
        """Training loss of the first round; the validation loss before the first step stands for it until then."""
        return self.initial_loss if self.first_training is None else self.first_training

    @property
    def _lowest(self) -> float:
        return self._first if self.lowest_training is None else self.lowest_training

    def _rise(self, training: float | None) -> float:
        """How far the training loss is above that of the first round, in shares of its height; 0 if nobody can say.

        The height of a loss that was never below 0 is counted from 0, another one's from the lowest that was seen: a
        likelihood's zero means nothing.
        """
        height = self._first - min(self._lowest, 0.0)
        return 0.0 if training is None or height <= 0 else (training - self._first) / height

    def _with_training(self, training: float | None, *, is_lost: bool) -> Guard:
        if training is None:
            return self
        first = training if self.first_training is None and not is_lost else self.first_training
        lowest = training if self.lowest_training is None else min(training, self.lowest_training)
        return replace(self, first_training=first, lowest_training=lowest)

    def _with_best(self, own: tuple[float, ...], kind: str, share: float) -> Guard:
        """With a round that goes on. Rollbacks count anew after as much progress as counts as lost ground.

        Anything less could come from the lower learning rates themselves. A loss that creeps down and then rises
        would be rolled back, creep, and be rolled back again, until no learning rate is left.
        """
        difference, error = paired(own, self.best.get(kind, self.initial))
        best = {**self.best, kind: own} if difference < 0 else self.best
        mark = self.marks.get(kind, self.initial_loss)
        least = max(share * max(0.0, self.initial_loss - mark), SURE * error)
        if self.rollbacks and mark - mean_and_error(own)[0] <= least:
            return replace(self, best=best)
        return replace(self, best=best, marks={}, rollbacks=0, last_rise=None)


def paired(own: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Mean of ``own - other`` ([batches] losses) and its standard error.

    Over the same batches the difference is taken batch by batch, so that how hard a batch is drops out. If the
    numbers of batches differ (the run went on with other ranks), the two means' errors are added instead, which is
    more. One batch shows no error: ``UNKNOWN_ERROR`` of the loss stands for it.
    """
    if len(own) == len(other) > 1:
        return mean_and_error([mine - theirs for mine, theirs in zip(own, other, strict=True)])
    (mine, my_error), (theirs, their_error) = mean_and_error(own), mean_and_error(other)
    errors = (
        error if len(losses) > 1 else UNKNOWN_ERROR * abs(mean)
        for losses, mean, error in ((own, mine, my_error), (other, theirs, their_error))
    )
    return mine - theirs, math.hypot(*errors)


def _best_of(fitness: Fitness) -> tuple[float, ...]:
    return tuple(fitness.losses[fitness.ranking[0]].tolist())
