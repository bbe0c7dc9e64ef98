"""Who sees which samples: disjoint over the clan while it cooperates, the same for all members while they compete."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from clantune_scale.core.rounds import Phase, PhaseKind
from clantune_scale.errors import ConfigError


@dataclass(frozen=True)
class StepPlan:
    """What one optimizer step reads.

    Attributes:
        is_common: whether all members read the same samples.
        num_micro_batches: micro-batches that this rank reads; equal on all ranks unless ``is_common``, and
            inside a team always.
        clan_micro_batches: micro-batches per dp rank by which the clan moves on if ``is_common``: the most
            that any team reads, its members together; equal on all ranks, because teams' own numbers may
            differ then.
        team_index: this member's place in its team, from 0.
        team_size: members that split between them what is common (1 where the member is on its own).
    """

    is_common: bool
    num_micro_batches: int
    clan_micro_batches: int
    team_index: int = 0
    team_size: int = 1

    @classmethod
    def of(cls, phase: Phase, counts: Sequence[int], member: int) -> StepPlan:
        """What ``member`` reads in a step of ``phase``.

        Args:
            phase: that the step lies in.
            counts: [members] micro-batches that each one's ranks take, before ``batch_factor``.
            member: whose plan it is.
        """
        reads = [count * phase.batch_factor for count in counts]
        if phase.kind is PhaseKind.COOPERATIVE:
            return cls(False, reads[member], max(reads))
        teams = phase.teams or tuple(range(len(reads)))
        mates = [other for other, team in enumerate(teams) if team == teams[member]]
        most = max(read * teams.count(team) for read, team in zip(reads, teams, strict=True))
        return cls(True, reads[member], most, mates.index(member), len(mates))


@dataclass(frozen=True)
class StreamPosition:
    """A point of one rank's stream: a step, the clan's cursor at its start, micro-batches done in it."""

    step: int = 0
    cursor: int = 0
    micro: int = 0


class ClanBatchSampler(Sampler[list[int]]):
    """One rank's micro-batches, as lists of sample indices, without end and without communication.

    The clan reads one global order: epoch ``e`` is a permutation seeded by (seed, e), and position ``c``
    lies in epoch ``c // num_samples``. A cursor counts the positions that the clan is past.

    - Cooperating, micro-batch j of rank (member m, dp rank d) starts ``((j P + m) dp + d) mb`` after the
      cursor, and the step moves it by ``num_micro_batches P dp mb``. That is how plain data parallelism
      lays out its rank ``m dp + d``: a clan of equal genomes sees what a plain run sees.
    - Competing, it starts ``((j n + i) dp + d) mb`` after the cursor, where the member is the i-th of the n
      in its team, and the step moves the cursor by ``clan_micro_batches dp mb``. So members of a team share
      out what every team reads from the same place on; a member on its own (i = 0, n = 1) reads all of it.

    It is ``Stateful``: its state says what training *consumed*, which :meth:`consume` counts, and not what
    workers have prefetched. A state saved inside a step is that of the step's start, because gradients
    that are half accumulated are not saved either. Where ``plan`` is a pure function of the step (no
    accumulation gene moves), ``{"step": n}`` alone is a complete state.

    Args:
        num_samples: length of the dataset.
        seed: of the global order.
        micro_batch_size: samples per micro-batch and rank.
        dp_size: data-parallel ranks in a member.
        dp_rank: this rank's place among them.
        member: this rank's member.
        population_size: number of members.
        plan: step to what it reads; asked ahead of training as far as workers prefetch.
        shuffle: whether epochs are permuted, at 8 bytes per sample; if not, every epoch is in the
            dataset's order.

    Raises:
        ConfigError: if the dataset cannot give every rank one micro-batch.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        seed: int,
        micro_batch_size: int,
        dp_size: int,
        dp_rank: int,
        member: int,
        population_size: int,
        plan: Callable[[int], StepPlan],
        shuffle: bool = True,
    ) -> None:
        require_samples(
            num_samples, population_size=population_size, dp_size=dp_size, micro_batch_size=micro_batch_size
        )
        self._num_samples, self._seed, self._shuffle = num_samples, seed, shuffle
        self._micro_batch_size, self._dp_size, self._dp_rank = micro_batch_size, dp_size, dp_rank
        self._member, self._population_size = member, population_size
        self._plan = plan
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))
        self.position = StreamPosition()
        self._counts = False

    @property
    def micro_batches_per_epoch(self) -> int:
        """Micro-batches of this rank in one pass of the cooperating clan over the data, whole ones only."""
        return self._num_samples // (self._population_size * self._dp_size * self._micro_batch_size)

    @property
    def worker_seed(self) -> int:
        """A seed for prefetching workers, equal for the same rank of every member."""
        return int(np.random.SeedSequence((self._seed % 2**64, self._dp_rank)).generate_state(1)[0])

    def __iter__(self) -> Iterator[list[int]]:
        """Micro-batches from the consumed place on."""
        position = self.position
        while True:
            yield self._indices(self._start(position))
            position = self._after(position)

    def consume(self) -> None:
        """Counts one micro-batch as handed to training."""
        self._counts = True
        self.position = self._after(self.position)

    def state_dict(self) -> dict[str, int]:
        return {"step": self.position.step, "cursor": self.position.cursor}

    def progress(self, step: int) -> dict[str, int]:
        """The place after ``step`` optimizer steps of the run: what was counted, or the step where nobody counts.

        A loader of torch's around this sampler does not call :meth:`consume`. A loop that holds the next step's
        first batch already has not trained on it: it is drawn again.
        """
        if not self._counts:
            return {"step": step}
        if self.position == StreamPosition(step + 1, self.position.cursor):
            return {"step": step, "cursor": self.position.cursor - self._advance(self._plan(step))}
        return self.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes to a saved place; without its ``"cursor"``, to where the plans of all steps before lead."""
        step = state["step"]
        cursor = state["cursor"] if "cursor" in state else sum(self._advance(self._plan(s)) for s in range(step))
        self.position = StreamPosition(step, cursor)
        self._counts = "cursor" in state

    def _start(self, position: StreamPosition) -> int:
        """The global position at which this rank's micro-batch begins."""
        plan = self._plan(position.step)
        split = (plan.team_size, plan.team_index) if plan.is_common else (self._population_size, self._member)
        block = position.micro * split[0] + split[1]
        return position.cursor + (block * self._dp_size + self._dp_rank) * self._micro_batch_size

    def _after(self, position: StreamPosition) -> StreamPosition:
        plan = self._plan(position.step)
        if position.micro + 1 < plan.num_micro_batches:
            return StreamPosition(position.step, position.cursor, position.micro + 1)
        return StreamPosition(position.step + 1, position.cursor + self._advance(plan))

    def _advance(self, plan: StepPlan) -> int:
        """Positions that a step takes from the global order."""
        blocks = plan.clan_micro_batches if plan.is_common else plan.num_micro_batches * self._population_size
        return blocks * self._dp_size * self._micro_batch_size

    def _indices(self, start: int) -> list[int]:
        positions = range(start, start + self._micro_batch_size)
        return [int(self._epoch(p // self._num_samples)[p % self._num_samples]) for p in positions]

    def _epoch(self, epoch: int) -> np.ndarray:
        """[num_samples] int64, the order of an epoch; the last one asked for is kept."""
        if self._order[0] != epoch:
            order = np.arange(self._num_samples)
            if self._shuffle:
                generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((self._seed % 2**64, epoch))))
                generator.shuffle(order)
            self._order = (epoch, order)
        return self._order[1]


def require_samples(num_samples: int, *, population_size: int, dp_size: int, micro_batch_size: int) -> None:
    """Checks that a dataset can give every rank of the clan one micro-batch.

    Raises:
        ConfigError: if it cannot, with the arithmetic.
    """
    needed = population_size * dp_size * micro_batch_size
    if num_samples < needed:
        raise ConfigError(
            f"the dataset has {num_samples} samples, fewer than one micro-batch of every rank takes: "
            f"population_size({population_size}) x dp({dp_size}) x micro_batch({micro_batch_size}) = {needed}. "
            f"Give it more data, or lower train_micro_batch_size_per_gpu."
        )


class ClanDataLoader:
    """A torch ``DataLoader`` over a :class:`ClanBatchSampler` that knows what training consumed.

    One ``iter()`` yields the micro-batches of one epoch of cooperative training and the next goes on from
    there, so that loops over epochs and endless ones read the same stream. What workers prefetched is
    kept in between. Phase changes need nothing: plans are known ahead. When a decision of the clan
    changes what coming steps read (an accumulation gene moved), call :meth:`replan`.

    Args:
        dataset: with ``__len__`` and ``__getitem__``.
        sampler: this rank's.
        num_workers: prefetching processes, as in ``DataLoader``.
        on_first: called once, before the first micro-batch is drawn.
        **options: passed on to ``DataLoader`` (``collate_fn``, ``pin_memory`` and so on).
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: ClanBatchSampler,
        *,
        num_workers: int = 0,
        on_first: Callable[[], None] | None = None,
        **options: Any,
    ) -> None:
        self.dataset, self.batch_sampler = dataset, sampler
        self._on_first = on_first
        # Workers that persist make replan() cheap: they drop what they fetched and start over. A generator of
        # its own keeps the loader from drawing its workers' seeds out of the stream that dropout reads, and
        # gives competing members, whose samples are common, common augmentations too.
        generator = torch.Generator().manual_seed(sampler.worker_seed)
        options = {"persistent_workers": num_workers > 0, "generator": generator, **options}
        self._loader = DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, **options)
        self._stream: Iterator[Any] | None = None

    def __len__(self) -> int:
        """Micro-batches of one epoch of cooperative training."""
        return self.batch_sampler.micro_batches_per_epoch

    def __iter__(self) -> Iterator[Any]:
        for _ in range(len(self)):
            if self._on_first is not None:
                self._on_first, call = None, self._on_first
                call()
            if self._stream is None:
                self._stream = iter(self._loader)
            batch = next(self._stream)
            # Counted before it is handed out: whoever saves while working on it has consumed it.
            self.batch_sampler.consume()
            yield batch

    def replan(self) -> None:
        """Drops what was prefetched; the next micro-batch is drawn by the present plans."""
        self._stream = None

    def state_dict(self) -> dict[str, int]:
        return self.batch_sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes on from a saved place, inside a running loop too."""
        self.batch_sampler.load_state_dict(state)
        self.replan()
