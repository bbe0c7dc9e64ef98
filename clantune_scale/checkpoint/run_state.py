"""What rounds on disk ask of a run. The runtime has it; nothing here imports the runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from clantune_scale.checkpoint.streams import RandomState
from clantune_scale.config.batch import BatchPlan
from clantune_scale.config.schema import ClanConfig
from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Gene
from clantune_scale.core.lineage import Lineage
from clantune_scale.core.rounds import Position, RoundPlan
from clantune_scale.core.strategies import Population, Strategy
from clantune_scale.data.sampler import ClanBatchSampler
from clantune_scale.data.watch import LossMeter
from clantune_scale.distributed.world import ClanGroups, ClanWorld
from clantune_scale.transfer import Snapshot


class SavedEngine(RandomState, Protocol):
    """What a round holds of a member's engine beside its tensors.

    Attributes:
        module: the user's module (this rank's part of it).
        dp_size: data-parallel replicas of the member.
        accumulation: micro-batches per optimizer step; writable between steps.
    """

    accumulation: int

    @property
    def module(self) -> torch.nn.Module: ...

    @property
    def dp_size(self) -> int: ...

    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's live groups, by reference."""

    def optimizer_name(self) -> str:
        """The optimizer's class."""

    def masters(self) -> list[torch.Tensor]:
        """This rank's live fp32 weights."""

    def counters(self) -> dict[str, int]:
        """What the engine counts for itself: steps, micro-batches, samples."""

    def load_counters(self, counters: Mapping[str, int]) -> None:
        """Takes over such counts."""


class Clock(Protocol):
    """Where a run is in its rounds.

    Attributes:
        position: of the next step.
        averaged_before: whether the round before measured averaged weights.
        first_step: at which the first round started.
    """

    @property
    def position(self) -> Position: ...

    @property
    def averaged_before(self) -> bool: ...

    @property
    def first_step(self) -> int: ...

    def resume(self, step: int, past: Sequence[RoundPlan], teams: tuple[int, ...] | None, *, first_step: int) -> None:
        """Moves to ``step`` completed optimizer steps, after finished rounds."""


class RunView(Protocol):
    """One rank's clan, as far as rounds on disk use it; :class:`clantune_scale.runtime.view.ClanView` is one."""

    @property
    def world(self) -> ClanWorld: ...

    @property
    def member(self) -> int: ...

    @property
    def has_one_state(self) -> bool: ...

    @property
    def backend(self) -> SavedEngine: ...

    @property
    def config(self) -> ClanConfig: ...

    @property
    def batch(self) -> BatchPlan: ...

    @property
    def genes(self) -> tuple[Gene, ...]: ...

    @property
    def strategy(self) -> Strategy: ...

    @property
    def phases(self) -> Clock: ...

    @property
    def groups(self) -> ClanGroups: ...


class RunProgress(Protocol):
    """What a run has come to: saved with each round, and set when it is resumed.

    :class:`clantune_scale.runtime.view.Progress` is one, and says what each field is.
    """

    population: Population
    fitness: Fitness
    phase_snapshot: Snapshot | None
    rollback_snapshot: Snapshot | None
    losses: LossMeter
    samplers: list[ClanBatchSampler]
    lineage: Lineage
    num_samples: int
