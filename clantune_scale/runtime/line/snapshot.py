"""All that a turn of training changes on one rank, so that the next turn starts where this one did."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from clantune_scale.checkpoint.streams import RandomStreams
from clantune_scale.runtime.engine_protocol import RandomState
from clantune_scale.transfer import MemberState, Snapshot


class SnapshotEngine(RandomState, Protocol):
    """What a training snapshot reads from an engine, and writes back."""

    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's live groups."""

    def counters(self) -> dict[str, int]:
        """What the engine counts."""

    def load_counters(self, counters: Mapping[str, int]) -> None:
        """Takes over such counts."""


class TrainingSnapshot:
    """Weights, averages, optimizer, scheduler, loss scale, parameter groups, the engine's counts and random streams.

    Tensors go to host memory. The data that a turn reads are held apart (:class:`~clantune_scale.runtime.line.turns`).

    Args:
        state: this rank's live training state.
        engine: that trains.
        tensors: a snapshot of this state, if there is one already.
        streams: random streams to go on with in place of the present ones.
        former: a snapshot that is given up; its memory is used again.
    """

    def __init__(
        self,
        state: MemberState,
        engine: SnapshotEngine,
        tensors: Snapshot | None = None,
        *,
        former: TrainingSnapshot | None = None,
        streams: RandomStreams | None = None,
    ) -> None:
        self._tensors: Snapshot = tensors or Snapshot(state, None if former is None else former._tensors)
        self._scalars = copy.deepcopy(dict(state.scalars))
        self._groups = [
            {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
            for group in engine.param_groups()
        ]
        self._counters, self._streams = engine.counters(), streams or RandomStreams.capture(engine)

    def restore(self, state: Callable[[], MemberState], engine: SnapshotEngine) -> None:
        """Puts everything back, in place (a collective of the engine's ranks).

        Args:
            state: gives the live state.
            engine: that trains.

        Raises:
            ValueError: if the state has other tensors than when the snapshot was taken.
        """
        self._tensors.restore(state)
        state().load_scalars(copy.deepcopy(self._scalars))
        for group, before in zip(engine.param_groups(), self._groups, strict=True):
            group.update(copy.deepcopy(before))
        engine.load_counters(self._counters)
        self._streams.restore(engine)

    def saved(self) -> dict[str, Any]:
        """All of it, in tensors, numbers and texts."""
        return {
            "tensors": dict(self._tensors.tensors),
            "snapshot_scalars": self._tensors.scalars,
            "scalars": self._scalars,
            "groups": self._groups,
            "counters": self._counters,
            "streams": [self._streams.tensors, self._streams.numbers],
        }

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> TrainingSnapshot:
        """The snapshot that :meth:`saved` told of."""
        snapshot = cls.__new__(cls)
        snapshot._tensors = Snapshot.of(saved["tensors"], saved["snapshot_scalars"])
        snapshot._scalars, snapshot._groups = saved["scalars"], saved["groups"]
        snapshot._counters, snapshot._streams = saved["counters"], RandomStreams(*saved["streams"])
        return snapshot
