"""Members in time: competitors of a competitive phase train one after the other, from one state, on the same batches.

The loop's own steps are the first competitor's turn. The batches that it draws are held in host memory. The other turns
follow at the phase's end and train on them, so that the loop around sees the steps and the batches of a run without a
clan. Each turn is measured at its end. Only the start and the best end are held: a phase costs two copies of the state
in host memory, whatever the number of competitors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from clantune_scale.checkpoint.streams import RandomStreams
from clantune_scale.core.genome import GROUP_KEYS
from clantune_scale.data.containers import leaves_of, map_leaves
from clantune_scale.data.watch import LossMeter
from clantune_scale.errors import CheckpointError, ClanError, ConfigError
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
        self._batch = map_leaves(self._hold, batch)
        # Of a batch out of a checkpoint, until one of the same form shows what holds its leaves.
        self._leaves: list[Any] | None = None
        self._form = ""

    def get(self) -> Any:
        """The batch, in tensors of its own.

        Raises:
            CheckpointError: if it comes from a checkpoint, and no batch of its form has come since.
        """
        if self._leaves is not None:
            raise CheckpointError(
                f"a competitive phase goes on from a checkpoint in its middle, and its batches have the form "
                f"{self._form} there, which no batch has had since. Feed the loop as before, or resume from another "
                f"checkpoint."
            )
        devices = iter(self._devices)
        return map_leaves(lambda leaf: leaf.to(next(devices), copy=True) if _is_tensor(leaf) else leaf, self._batch)

    def saved(self) -> list[Any]:
        """[its leaves, what holds them in words, the devices of its tensors], for a checkpoint.

        Leaves are tensors, numbers and text; of another leaf, only that it was there.
        """
        leaves = [leaf if is_plain(leaf) else _UNSAVED for leaf in leaves_of(self._batch)]
        return [leaves, form_of(self._batch), [str(device) for device in self._devices]]

    @classmethod
    def of(cls, saved: Sequence[Any]) -> HeldBatch:
        """The batch that :meth:`saved` told of; it waits for :meth:`take_form`.

        Raises:
            CheckpointError: if a leaf was not saved.
        """
        leaves, form, devices = saved
        if _UNSAVED in [leaf for leaf in leaves if isinstance(leaf, str)]:
            raise CheckpointError(
                f"the checkpoint lies in the middle of a competitive phase, and its batches hold more than tensors, "
                f"numbers and text: {form}. Resume from a checkpoint outside the phase."
            )
        held = cls(None)
        held._leaves, held._form = list(leaves), form
        held._devices = [torch.device(name) for name in devices]
        return held

    def take_form(self, batch: Any) -> None:
        """Puts the leaves into containers like those of ``batch``, if it is of the same form."""
        if self._leaves is not None and form_of(batch) == self._form:
            leaves = iter(self._leaves)
            self._batch, self._leaves = map_leaves(lambda _: next(leaves), batch), None

    def _hold(self, leaf: Any) -> Any:
        if not _is_tensor(leaf):
            return leaf
        self._devices.append(leaf.device)
        return leaf.detach().to("cpu", copy=True)


#: What a schedule may set in a parameter group, as a gene may.
_SCHEDULED = sorted({key for key, _ in GROUP_KEYS.values()})
#: Stands for a leaf that a checkpoint cannot hold.
_UNSAVED = "clantune: not saved"


def form_of(batch: Any) -> str:
    """What holds a batch's leaves, without them."""
    return repr(map_leaves(lambda leaf: None, batch))


def is_plain(leaf: Any) -> bool:
    """Whether a checkpoint can hold a leaf of a batch."""
    return leaf is None or isinstance(leaf, bool | int | float | str | torch.Tensor)


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
        streams: random streams at the first turn's end. The loop goes on with them: it may have drawn from them for its
            data, which later turns do not.
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
    streams: RandomStreams | None = None
    meter: LossMeter = field(default_factory=LossMeter)
    _steps: list[list[HeldBatch]] = field(default_factory=list)
    _open: list[HeldBatch] = field(default_factory=list)
    # By step of the run and parameter group: what the loop's schedule had put there at the first turn's update.
    _scheduled: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

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
            for held in (held for step in self._steps for held in step):
                held.take_form(batch)
            self._open.append(HeldBatch(batch))

    def follow_schedule(self, step: int, groups: Sequence[dict[str, Any]]) -> None:
        """Notes what the loop's schedule has put into the groups, at the first turn's updates; puts it there at others.

        A loop may write its rates by hand, or step its schedulers at places that turns do not come by.

        Args:
            step: of the run.
            groups: the optimizer's live ones, before genes are written into them.
        """
        if self.is_first:
            present = [{key: group[key] for key in _SCHEDULED if key in group} for group in groups]
            self._scheduled[step] = copy.deepcopy(present)  # a rate may be a tensor
        elif step in self._scheduled:  # else its gradients had overflowed, and nothing was updated
            for group, scheduled in zip(groups, self._scheduled[step], strict=True):
                group.update(copy.deepcopy(scheduled))

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
        self.streams = self.streams or RandomStreams.capture(engine)
        self.ended.append(Ended(losses, (total + training[0], count + training[1]), learning_rate))
        if self.keeps and (self.best is None or _mean(losses) < _mean(self.ended[self.best[0]].losses)):
            former = None if self.best is None else self.best[1]
            end = TrainingSnapshot(state(), engine, former=former, streams=self.streams)
            self.best = (len(self.ended) - 1, end)

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

    def saved(self) -> dict[str, Any]:
        """A phase that is stopped in its first turn, between two steps, in tensors, numbers and what batches hold."""
        return {
            "competitors": [[list(one.members), one.values] for one in self.competitors],
            "steps": [self.start_step, self.end_step],
            "start": self.start.saved(),
            "losses_before": list(self.losses_before),
            "keeps": self.keeps,
            "samplers": self.samplers,
            "scheduled": self._scheduled,
            "held": [[batch.saved() for batch in step] for step in self._steps],
        }

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Turns:
        """The phase that :meth:`saved` told of."""
        total, count = saved["losses_before"]
        start_step, end_step = saved["steps"]
        turns = cls(
            [Competitor(tuple(members), values) for members, values in saved["competitors"]],
            start_step,
            end_step,
            TrainingSnapshot.of(saved["start"]),
            (total, count),
            saved["keeps"],
            saved["samplers"],
        )
        turns._scheduled = dict(saved["scheduled"])
        turns._steps = [[HeldBatch.of(batch) for batch in step] for step in saved["held"]]
        return turns


def _mean(losses: np.ndarray) -> float:
    """The order that :class:`~clantune_scale.core.fitness.Fitness` ranks by: a loss that is not finite comes last."""
    return float(losses.mean()) if np.isfinite(losses).all() else float("inf")
