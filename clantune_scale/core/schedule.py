"""The schedule that a clan found along one member's ancestry: values by step, as JSON, for replay."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clantune_scale.core.consensus import consensus
from clantune_scale.core.genome import Gene
from clantune_scale.core.lineage import Lineage, RoundRecord
from clantune_scale.core.rounds import Phase, PhaseKind
from clantune_scale.errors import ConfigError

#: Version of the JSON form.
SCHEMA = 1
_KIND = "clan_schedule"


@dataclass(frozen=True)
class Segment:
    """Steps over which every gene keeps its value.

    Attributes:
        start_step: steps completed before the segment.
        end_step: steps completed at its end.
        values: by gene name, as they took effect.
        lr_factor: the final decay's factor at ``start_step`` and at ``end_step``; linear between them.
        undone: whether its training was rolled back, and is not in the champion.
    """

    start_step: int
    end_step: int
    values: Mapping[str, float]
    lr_factor: tuple[float, float] = (1.0, 1.0)
    undone: bool = False


@dataclass(frozen=True)
class ClanSchedule:
    """Piecewise-constant genes over a run.

    Attributes:
        genes: what the names mean; each a :class:`Gene` as a dict (target, scale, relative and so on).
        segments: in order and without gaps.
        rate_factor: multiplies every learning rate, to adapt it to another batch.
    """

    genes: tuple[Mapping[str, Any], ...]
    segments: tuple[Segment, ...]
    rate_factor: float = 1.0

    @classmethod
    def from_lineage(
        cls,
        lineage: Lineage,
        genes: Sequence[Gene],
        *,
        member: int,
        lr_factor: Callable[[int], float] = lambda step: 1.0,
    ) -> ClanSchedule:
        """The values that trained the weights that ``member`` carries after the last round.

        If members' weights were averaged (HDET), many members' values trained them. A gene's value is then the
        members' mean in the gene's scale, each weighted by its share in those weights.

        Args:
            lineage: of the run.
            genes: of its genomes.
            member: whose ancestry to follow, usually the champion.
            lr_factor: the strategy's, by step; its kinks must lie between rounds.

        Raises:
            ConfigError: if no round was finished.
        """
        if not len(lineage):
            raise ConfigError("no round was finished, so there is no schedule. Train for at least one round.")
        segments = [
            Segment(start, end, values, (lr_factor(start), lr_factor(end)), undone)
            for record, shares in zip(lineage, lineage.shares(member), strict=True)
            for start, end, values, undone in _stretches(record, shares, genes)
        ]
        return cls(tuple(asdict(gene) for gene in genes), tuple(segments))

    @property
    def num_steps(self) -> int:
        """Optimizer steps from the run's start to the last segment's end."""
        return self.segments[-1].end_step

    @property
    def described_genes(self) -> tuple[Gene, ...]:
        """The genes as objects."""
        return tuple(gene_from_plain(gene) for gene in self.genes)

    def value_at(self, gene: str, step: int) -> float:
        """The gene's value in the step that follows ``step`` completed ones; the last one beyond the end.

        Undone steps take the value of the next steps that were not undone, because a replay trains in them too.

        Raises:
            KeyError: if there is no such gene.
        """
        index = self._index(step)
        kept = next((segment for segment in self.segments[index:] if not segment.undone), self.segments[index])
        return kept.values[gene]

    @property
    def decay_start_step(self) -> int | None:
        """The step from which learning rates fall to the end (there the factor is still 1); None if they do not."""
        return next((s.start_step for s in self.segments if s.lr_factor[1] < s.lr_factor[0]), None)

    def lr_factor_at(self, step: int) -> float:
        """The final decay's factor in that step; the last one beyond the end."""
        segment = self.segments[self._index(step)]
        first, last = segment.lr_factor
        share = (step - segment.start_step) / (segment.end_step - segment.start_step)
        return first + (last - first) * min(share, 1.0)

    def to_json(self) -> str:
        """One JSON object, indented for people."""
        segments = [asdict(segment) for segment in self.segments]
        plain = {"schema": SCHEMA, "kind": _KIND, "genes": self.genes, "rate_factor": self.rate_factor}
        return json.dumps({**plain, "segments": segments}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> ClanSchedule:
        """The schedule that :meth:`to_json` wrote.

        Raises:
            ConfigError: if the text is not JSON, no schedule, or one of another schema version.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"the schedule is not JSON: {error}. Give the file that a clan run wrote.") from error
        if not isinstance(data, dict) or data.get("kind") != _KIND:
            raise ConfigError(f"the JSON is not of kind {_KIND!r}. Give the schedule file that a clan run wrote.")
        if data.get("schema") != SCHEMA:
            raise ConfigError(
                f"the schedule has schema version {data.get('schema')!r}, and this version reads {SCHEMA}. "
                f"Read it with the version of clantune_scale that wrote it."
            )
        if not data["segments"]:
            raise ConfigError("the schedule has no segments. Give the file of a run that finished a round.")
        segments = (Segment(**{**item, "lr_factor": tuple(item["lr_factor"])}) for item in data["segments"])
        # The first schedule files had no factor on learning rates.
        return cls(tuple(data["genes"]), tuple(segments), data.get("rate_factor", 1.0))

    def _index(self, step: int) -> int:
        if step < 0:
            raise ValueError(f"steps count from 0, not from {step}")
        return bisect_right(self.segments, step, key=lambda segment: segment.start_step) - 1


def gene_from_plain(plain: Mapping[str, Any]) -> Gene:
    """The gene from the JSON form of its ``dataclasses.asdict``; fields of newer versions are dropped."""
    known = {key: value for key, value in plain.items() if key in Gene.__dataclass_fields__}
    groups = known.get("groups")
    return Gene(**{**known, "bounds": tuple(known["bounds"]), "groups": tuple(groups) if groups else None})


def _stretches(
    record: RoundRecord, shares: Sequence[float] | None, genes: Sequence[Gene]
) -> Iterator[tuple[int, int, dict[str, float], bool]]:
    """(start, end, values, undone) of each phase: its carriers' values, or the consensus if undone."""
    start = record.start_step
    for phase in record.phases:
        end = start + phase.num_steps
        yield start, end, _in_effect(record, shares, phase, genes), shares is None or not phase.keeps
        start = end


def _in_effect(
    record: RoundRecord, shares: Sequence[float] | None, phase: Phase, genes: Sequence[Gene]
) -> dict[str, float]:
    """Optimizer genes are the carriers' own throughout, specialized ones only while they competed."""
    agreed = consensus(record.genomes, genes)
    if shares is None:
        return agreed
    return {
        gene.name: _carried(record, shares, gene)
        if gene.kind == "optimizer" or phase.kind is PhaseKind.COMPETITIVE
        else agreed[gene.name]
        for gene in genes
    }


def _carried(record: RoundRecord, shares: Sequence[float], gene: Gene) -> float:
    """The mean, in the gene's scale, of the shareholders' values; equal values are returned untouched."""
    held = [(share, genome.values[gene.name]) for share, genome in zip(shares, record.genomes, strict=True) if share]
    if len({value for _, value in held}) == 1:
        return gene.expressed(held[0][1])
    return gene.expressed(gene.decode(math.fsum(share * gene.encode(value) for share, value in held)))
