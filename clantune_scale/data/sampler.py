"""Which samples a rank reads: disjoint ones in a cooperative phase, the same for all members in a competitive one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from clantune_scale.core.rounds import Phase, PhaseKind
from clantune_scale.errors import ConfigError


def is_map_style(dataset: Any) -> bool:
    """Whether examples have numbers, by which they can be read again. Some streams have a length, and no index."""
    # torch's base class has a __getitem__ that only raises.
    index = getattr(type(dataset), "__getitem__", None)
    is_stream = isinstance(dataset, IterableDataset) or index is Dataset.__getitem__
    return not is_stream and index is not None and hasattr(dataset, "__len__")


@dataclass(frozen=True)
class StepPlan:
    """What one optimizer step reads.

    Attributes:
        is_common: whether all members read the same samples.
        num_micro_batches: micro-batches that this rank reads. Equal on all ranks if not ``is_common``, and always equal
            inside a team.
        clan_micro_batches: micro-batches per dp rank by which the clan's cursor advances if ``is_common``: the most
            that any team reads, its members together. Equal on all ranks, although teams may read different numbers.
        team_index: this member's index in its team, from 0.
        team_size: members that share the common samples out among them (1 for a member without a team).
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
            phase: of the step.
            counts: [members] micro-batches per rank of each member, before ``batch_factor``.
            member: the plan is for this one.
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
    """A position in one rank's stream.

    Attributes:
        step: optimizer step.
        cursor: the clan's cursor at the start of the step, in samples.
        micro: micro-batches that this rank has read in the step.
    """

    step: int = 0
    cursor: int = 0
    micro: int = 0


class ClanBatchSampler(Sampler[list[int]]):
    """One rank's micro-batches, as an endless stream of lists of sample indices, without communication.

    The clan reads one global order. Data epoch ``e`` is a permutation seeded by (seed, e), and position ``c`` lies in
    epoch ``c // num_samples``. A cursor counts the positions that the clan has read.

    - In a cooperative phase, micro-batch j of rank (member m, dp rank d) starts ``((j P + m) dp + d) mb`` after the
      cursor, and a step advances the cursor by ``num_micro_batches P dp mb``. Plain data parallelism gives the same
      samples to its rank ``m dp + d``, so a clan of equal genomes sees what a plain run sees.
    - In a competitive phase, it starts ``((j n + i) dp + d) mb`` after the cursor, for the i-th of the n members of a
      team, and a step advances the cursor by ``clan_micro_batches dp mb``. All teams read from the same position, and
      the members of a team share the samples out. A member without a team (i = 0, n = 1) reads all of them.

    The sampler is ``Stateful``. Its state is what training has *consumed*, which :meth:`consume` counts, and not what
    workers have prefetched. A state that is saved inside a step is the state of the step's start, because half
    accumulated gradients are not saved either. If ``plan`` is a pure function of the step (no accumulation gene
    moves), ``{"step": n}`` is a complete state.

    Args:
        num_samples: length of the dataset.
        seed: of the global order.
        micro_batch_size: samples per micro-batch and rank.
        dp_size: data-parallel ranks in a member.
        dp_rank: this rank's index among them.
        member: this rank's member.
        population_size: number of members.
        plan: maps a step to what it reads. It is called for future steps as far as workers prefetch.
        shuffle: whether data epochs are permuted, which takes 8 bytes per sample. If not, every data epoch is in the
            dataset's order.

    Raises:
        ConfigError: if the dataset is smaller than one micro-batch of every rank.
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
        """Full micro-batches of this rank in one cooperative pass of the clan over the data."""
        return self._num_samples // (self._population_size * self._dp_size * self._micro_batch_size)

    @property
    def worker_seed(self) -> int:
        """A seed for prefetching workers, equal on all peers."""
        return int(np.random.SeedSequence((self._seed % 2**64, self._dp_rank)).generate_state(1)[0])

    def __iter__(self) -> Iterator[list[int]]:
        """Yields micro-batches from the consumed position on."""
        position = self.position
        while True:
            yield self._indices(self._start(position))
            position = self._after(position)

    def begin(self, step: int) -> None:
        """Goes on with the present samples as those of ``step`` completed optimizer steps."""
        self.position = StreamPosition(step, self.position.cursor)

    def consume(self) -> None:
        """Counts one micro-batch as consumed by training."""
        self._counts = True
        self.position = self._after(self.position)

    def state_dict(self) -> dict[str, int]:
        return {"step": self.position.step, "cursor": self.position.cursor}

    def progress(self, step: int) -> dict[str, int]:
        """The state after ``step`` optimizer steps of the run.

        The state is what :meth:`consume` counted, or only the step if nobody called it (torch's own loader does not). A
        loop may already hold the first batch of the next step. It has not trained on that batch, so a resumed run reads
        it again.

        Args:
            step: optimizer steps done.
        """
        if not self._counts:
            return {"step": step}
        if self.position == StreamPosition(step + 1, self.position.cursor):
            return {"step": step, "cursor": self.position.cursor - self._advance(self._plan(step))}
        return self.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Goes to a saved position. Without a ``"cursor"``, the plans of all steps before give it."""
        step = state["step"]
        cursor = state["cursor"] if "cursor" in state else sum(self._advance(self._plan(s)) for s in range(step))
        self.position = StreamPosition(step, cursor)
        self._counts = "cursor" in state

    def _start(self, position: StreamPosition) -> int:
        """The global position at which this rank's micro-batch starts."""
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
        """The number of positions by which a step advances the cursor."""
        blocks = plan.clan_micro_batches if plan.is_common else plan.num_micro_batches * self._population_size
        return blocks * self._dp_size * self._micro_batch_size

    def _indices(self, start: int) -> list[int]:
        positions = range(start, start + self._micro_batch_size)
        return [int(self._epoch(p // self._num_samples)[p % self._num_samples]) for p in positions]

    def _epoch(self, epoch: int) -> np.ndarray:
        """[num_samples] int64: the order of a data epoch. The last one is cached."""
        if self._order[0] != epoch:
            order = np.arange(self._num_samples)
            if self._shuffle:
                generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((self._seed % 2**64, epoch))))
                generator.shuffle(order)
            self._order = (epoch, order)
        return self._order[1]


def require_samples(num_samples: int, *, population_size: int, dp_size: int, micro_batch_size: int) -> None:
    """Checks that a dataset has at least one micro-batch for every rank of the clan.

    Raises:
        ConfigError: if it has not. The message shows the arithmetic.
    """
    needed = population_size * dp_size * micro_batch_size
    if num_samples < needed:
        raise ConfigError(
            f"the dataset has {num_samples} samples, which is less than one micro-batch of every rank: "
            f"population_size({population_size}) x dp({dp_size}) x micro_batch({micro_batch_size}) = {needed}. "
            f"Use more data, or lower train_micro_batch_size_per_gpu."
        )


class ClanDataLoader:
    """A torch ``DataLoader`` over a :class:`ClanBatchSampler` that counts what training consumes.

    One ``iter()`` yields the micro-batches of one data epoch of cooperative training. The next one continues from
    there, so loops over epochs and endless loops read the same stream. Prefetched batches are kept in between. Phase
    changes need no call, because plans are known in advance. Call :meth:`replan` when a decision of the clan changes
    what future steps read (an accumulation gene moved).

    Args:
        dataset: with ``__len__`` and ``__getitem__``.
        sampler: this rank's.
        num_workers: prefetching processes, as in ``DataLoader``.
        on_first: is called once, before the first micro-batch is drawn.
        on_next: is called before each micro-batch is drawn. A step that ends late ends here, with what it consumed.
        **options: passed to ``DataLoader`` (``collate_fn``, ``pin_memory`` and so on).
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: ClanBatchSampler,
        *,
        num_workers: int = 0,
        on_first: Callable[[], None] | None = None,
        on_next: Callable[[], None] | None = None,
        **options: Any,
    ) -> None:
        self.dataset, self.batch_sampler = dataset, sampler
        self._on_first, self._on_next = on_first, on_next
        # Persistent workers make replan() cheap: they drop what they fetched and start over. A separate generator keeps
        # the loader from drawing its workers' seeds from the stream that dropout uses. It also gives competing members,
        # who read the same samples, the same augmentations.
        generator = torch.Generator().manual_seed(sampler.worker_seed)
        options = {"persistent_workers": num_workers > 0, "generator": generator, **options}
        self._loader = DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, **options)
        self._stream: Iterator[Any] | None = None

    def __len__(self) -> int:
        """Micro-batches of one data epoch of cooperative training."""
        return self.batch_sampler.micro_batches_per_epoch

    def __iter__(self) -> Iterator[Any]:
        for _ in range(len(self)):
            if self._on_first is not None:
                call, self._on_first = self._on_first, None
                call()
            if self._on_next is not None:
                self._on_next()
            if self._stream is None:
                self._stream = iter(self._loader)
            batch = next(self._stream)
            # Counted before the yield: a checkpoint that is saved during this batch's step includes the batch.
            self.batch_sampler.consume()
            yield batch

    def replan(self) -> None:
        """Drops prefetched batches. The next micro-batch follows the present plans."""
        self._stream = None

    def state_dict(self) -> dict[str, int]:
        return self.batch_sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues from a saved position, also inside a running loop."""
        self.batch_sampler.load_state_dict(state)
        self.replan()
