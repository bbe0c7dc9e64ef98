"""Which samples each member of each clan reads in a phase, laid out as ``ClanBatchSampler`` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clantune_scale.bench.batched.model import BatchedModel, Tensors
from clantune_scale.core.rounds import Phase
from clantune_scale.data.sampler import StepPlan


@dataclass(frozen=True)
class Reading:
    """What a step of a phase reads.

    Attributes:
        positions: [clans x members, samples] int64, in the step's stream of samples.
        shares: [clans x members, samples] float64, each sample's weight in its member's mean loss; None if all
            members read equally many.
        num_parts: batches of the model that the stream takes.
        num_samples: [clans] samples that each clan's members train on in a step, together.
    """

    positions: torch.Tensor
    shares: torch.Tensor | None
    num_parts: int
    num_samples: tuple[int, ...]

    @classmethod
    def of(cls, phases: Sequence[Phase], counts: Sequence[Sequence[int]], micro_batch: int, size: int) -> Reading:
        """What a phase reads.

        Args:
            phases: [clans], of equal length but perhaps with teams of their own.
            counts: [clans][members] micro-batches that each member takes, before ``batch_factor``.
            micro_batch: samples in one.
            size: members of a clan.
        """
        rows = [
            _positions(StepPlan.of(phase, own, member), member, micro_batch, size)
            for phase, own in zip(phases, counts, strict=True)
            for member in range(size)
        ]
        longest = max(len(row) for row in rows)
        # A member that reads less repeats its first sample, without weight.
        positions = torch.tensor([row + row[:1] * (longest - len(row)) for row in rows])
        shares = None
        if any(len(row) < longest for row in rows):
            weighted = [[1.0 / len(row)] * len(row) + [0.0] * (longest - len(row)) for row in rows]
            shares = torch.tensor(weighted, dtype=torch.float64)
        num_parts = int(positions.max()) // (size * micro_batch) + 1
        num_samples = tuple(sum(map(len, rows[i : i + size])) for i in range(0, len(rows), size))
        return cls(positions, shares, num_parts, num_samples)


class Feed:
    """Training samples for all members.

    Args:
        model: whose data it is.
        seeds: [clans]; clans of one seed see the same samples, drawn once.
        num_members: of a clan.
    """

    def __init__(self, model: BatchedModel, seeds: Sequence[int], num_members: int) -> None:
        self._model = model
        self._seeds = sorted(set(seeds))
        places = torch.tensor([self._seeds.index(seed) for seed in seeds])
        self._stream = places.repeat_interleave(num_members).unsqueeze(1)

    def read(self, step: int, reading: Reading) -> list[torch.Tensor]:
        """Tensors [clans x members, samples, ...] of one step."""
        streams = [self._samples(seed, step, reading.num_parts) for seed in self._seeds]
        return [torch.stack(columns)[self._stream, reading.positions] for columns in zip(*streams, strict=True)]

    def _samples(self, seed: int, step: int, num_parts: int) -> Tensors:
        parts = [self._model.batch(seed, step, part) for part in range(num_parts)]
        return parts[0] if num_parts == 1 else [torch.cat(columns) for columns in zip(*parts, strict=True)]


def _positions(plan: StepPlan, member: int, micro_batch: int, size: int) -> list[int]:
    """The samples of one member: its place among those who split what is read, micro-batch by micro-batch."""
    place, width = (plan.team_index, plan.team_size) if plan.is_common else (member, size)
    starts = ((micro * width + place) * micro_batch for micro in range(plan.num_micro_batches))
    return [start + offset for start in starts for offset in range(micro_batch)]
