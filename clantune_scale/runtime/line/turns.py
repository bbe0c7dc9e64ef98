"""Members in time: competitors of a competitive phase train one after the other, from one state, on the same batches.

The loop's own steps are the first competitor's turn. The batches that it draws are held in host memory. The other turns
follow at the phase's end and train on them, so that the loop around sees the steps and the batches of a run without a
clan. Each turn is measured at its end. Only the start and the best end are held: a phase costs two copies of the state
in host memory, whatever the number of competitors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from clantune_scale.data.watch import LossMeter
from clantune_scale.errors import ClanError, ConfigError
from clantune_scale.runtime.line.snapshot import SnapshotEngine, TrainingSnapshot
from clantune_scale.transfer import MemberState


@dataclass(frozen=True)
class Competitor:
    """One turn.

    Attributes:
        members: whom it stands for.
        values: by gene, what it trains with.
    """

    members: tuple[int, ...]
    values: dict[str, float]


def competitors_of(values: Sequence[dict[str, float]]) -> list[Competitor]:
    """The different genomes among the members, in the order in which they come.

    Competitors train on the same batches from the same state, so that equal genomes end in equal states.

    Args:
        values: [members] by gene.
    """
    found: dict[tuple[tuple[str, float], ...], list[int]] = {}
    for member, own in enumerate(values):
        found.setdefault(tuple(sorted(own.items())), []).append(member)
    return [Competitor(tuple(members), dict(values[members[0]])) for members in found.values()]


class HeldBatch:
    """A batch in host memory; :meth:`get` gives it back on the devices where its tensors were.

    Tensors are copied, because a loop may change them in place. All else is held as it is.
    """

    def __init__(self, batch: Any) -> None:
        self._devices: list[torch.device] = []
        self._batch = tree_map(self._hold, batch)

    def get(self) -> Any:
        """The batch, in tensors of its own."""
        devices = iter(self._devices)
        return tree_map(lambda leaf: leaf.to(next(devices), copy=True) if _is_tensor(leaf) else leaf, self._batch)

    def _hold(self, leaf: Any) -> Any:
        if not _is_tensor(leaf):
            return leaf
        self._devices.append(leaf.device)
        return leaf.detach().to("cpu", copy=True)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


@dataclass
class Ended:
    """A turn that was taken.

    Attributes:
        losses: [batches] on the validation window.
        training: (sum, number) of this rank's training losses in the round, the turn's among them.
        learning_rate: of the first parameter group in the turn's last step.
    """

    losses: np.ndarray
    training: tuple[float, int]
    learning_rate: float


@dataclass
class Turns:
    """The turns of one competitive phase.

    Args:
        competitors: at least two.
        start_step: optimizer steps done before the phase.
        end_step: optimizer steps done at its end.
        start: the state from which each competitor trains.
        losses_before: (sum, number) of this rank's training losses in the round before the phase.
        keeps: whether training goes on from a turn's end. If not, no end is held.
        samplers: states of the run's own samplers at the phase's start.

    Attributes:
        ended: by competitor that has trained.
        best: competitor whose end is held, and that end; None while there is none.
    """

    competitors: Sequence[Competitor]
    start_step: int
    end_step: int
    start: TrainingSnapshot
    losses_before: tuple[float, int]
    keeps: bool
    samplers: list[dict[str, int]]
    ended: list[Ended] = field(default_factory=list)
    best: tuple[int, TrainingSnapshot] | None = None
    meter: LossMeter = field(default_factory=LossMeter)
    _steps: list[list[HeldBatch]] = field(default_factory=list)
    _open: list[HeldBatch] = field(default_factory=list)

    @property
    def current(self) -> Competitor:
        """Who trains now, or who trained last."""
        return self.competitors[min(len(self.ended), len(self.competitors) - 1)]

    @property
    def is_first(self) -> bool:
        """Whether the loop's own steps are the turn: the run counts these, and no later one."""
        return not self.ended

    @property
    def is_over(self) -> bool:
        """Whether all competitors have trained."""
        return len(self.ended) == len(self.competitors)

    def hold(self, batch: Any) -> None:
        """Holds a micro-batch of the first turn."""
        if self.is_first:
            self._open.append(HeldBatch(batch))

    def drop_held(self) -> None:
        """Forgets the micro-batches of a step that was skipped."""
        self._open = []

    def step_done(self) -> None:
        """Ends a step of the first turn: the micro-batches that came since are its."""
        if self.is_first:
            self._steps.append(self._open)
            self._open = []

    def end_turn(
        self,
        losses: np.ndarray,
        state: Callable[[], MemberState],
        engine: SnapshotEngine,
        training: tuple[float, int],
        learning_rate: float,
    ) -> None:
        """Notes how a turn ended, and holds its end if it is the best so far.

        Args:
            losses: [batches] of the state at its end.
            state: gives the live state.
            engine: that trains.
            training: (sum, number) of the turn's own training losses on this rank.
            learning_rate: of the first parameter group in the turn's last step.
        """
        total, count = self.losses_before
        self.ended.append(Ended(losses, (total + training[0], count + training[1]), learning_rate))
        if self.keeps and (self.best is None or _mean(losses) < _mean(self.ended[self.best[0]].losses)):
            former = None if self.best is None else self.best[1]
            self.best = (len(self.ended) - 1, TrainingSnapshot(state(), engine, former=former))

    def batches(self) -> Iterator[list[Any]]:
        """The phase's steps again: each one's micro-batches."""
        for step in self._steps:
            yield [held.get() for held in step]

    def competitor_of(self, member: int) -> int:
        """The turn that a member's place in the population stands for."""
        return next(index for index, one in enumerate(self.competitors) if member in one.members)

    def end_for(self, weights: Sequence[float]) -> TrainingSnapshot | None:
        """The state that training goes on from; None if it is the live one.

        Args:
            weights: [members] of the decision.

        Raises:
            ConfigError, ClanError: if it is not one turn's, or not the fittest one's.
        """
        if max(weights) != 1.0:
            raise ConfigError('one model cannot average states that parted in turns. Set members to "groups".')
        wanted = self.competitor_of(list(weights).index(1.0))
        assert self.best is not None
        held, end = self.best
        if held != wanted:
            raise ClanError(
                f"the decision takes the state of a competitor with loss {float(self.ended[wanted].losses.mean()):g}, "
                f"and the fittest one's, {float(self.ended[held].losses.mean()):g}, is the one that is held. Members "
                f'on the line go on from the fittest of a competitive phase; set members to "groups".'
            )
        return None if held == len(self.competitors) - 1 else end


def _mean(losses: np.ndarray) -> float:
    """The order that :class:`~clantune_scale.core.fitness.Fitness` ranks by: a loss that is not finite comes last."""
    return float(losses.mean()) if np.isfinite(losses).all() else float("inf")
