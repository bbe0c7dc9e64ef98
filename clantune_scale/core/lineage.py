"""The append-only record of a run's rounds. It gives the members whose training a member carries."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Genome
from clantune_scale.core.mutation import CLAN
from clantune_scale.core.rounds import Phase, PhaseKind, RoundPlan
from clantune_scale.core.strategies.base import Decision
from clantune_scale.errors import ConfigError

#: Version of the JSON form.
SCHEMA = 1


@dataclass(frozen=True)
class RoundRecord:
    """One finished round.

    Attributes:
        index: 0 for the first round.
        start_step: optimizer steps that were done before it.
        phases: in order.
        genomes: the genome that each member carried through the round.
        losses: each member's mean loss on the common window; None if it was not finite.
        donors: as in ``Decision.donors``; ``donors[m] == m`` for all if nothing evolved.
        restored: whether the clan rolled back to its last rollback snapshot, which undoes the training since then.
        kept: whether a rollback snapshot was taken at its end.
        average: as in ``Decision.mixing_weights``; None if members' weights were not averaged.
    """

    index: int
    start_step: int
    phases: tuple[Phase, ...]
    genomes: tuple[Genome, ...]
    losses: tuple[float | None, ...]
    donors: tuple[int, ...]
    restored: bool = False
    kept: bool = True
    average: tuple[float, ...] | None = None

    @classmethod
    def of(cls, plan: RoundPlan, genomes: tuple[Genome, ...], fitness: Fitness, decision: Decision) -> RoundRecord:
        """The record of a round that ended with ``decision``."""
        losses = tuple(float(loss) if math.isfinite(loss) else None for loss in fitness.mean)
        return cls(
            plan.index,
            plan.start_step,
            plan.phases,
            genomes,
            losses,
            decision.donors,
            restored=decision.rolls_back,
            kept=decision.takes_snapshot and not decision.rolls_back,
            average=decision.mixing_weights,
        )

    @property
    def end_step(self) -> int:
        """Optimizer steps that were done at its end."""
        return self.start_step + sum(phase.num_steps for phase in self.phases)


def undone(restored: Sequence[bool], kept: Sequence[bool]) -> list[bool]:
    """By round, whether its training was undone: a rollback undoes every round since the last snapshot.

    Args:
        restored: by round, as in :class:`RoundRecord`.
        kept: likewise.
    """
    found, is_undone = [], False
    for rolled_back, is_kept in zip(reversed(restored), reversed(kept), strict=True):
        is_undone = rolled_back or (is_undone and not is_kept)
        found.append(is_undone)
    return found[::-1]


class Lineage:
    """The rounds of a run, in order.

    Attributes:
        resizes: for each change of the number of members, by the index of the first round after it: by new member,
            the member whose state it took.
    """

    def __init__(
        self, records: tuple[RoundRecord, ...] = (), resizes: Mapping[int, Sequence[int]] | None = None
    ) -> None:
        self.resizes = {index: tuple(sources) for index, sources in (resizes or {}).items()}
        self._records: list[RoundRecord] = []
        for record in records:
            self.append(record)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[RoundRecord]:
        return iter(self._records)

    def __getitem__(self, index: int) -> RoundRecord:
        return self._records[index]

    def append(self, record: RoundRecord) -> None:
        """Adds the next round.

        Raises:
            ValueError: if its index is not the next one, or the last round did not end at its start step. The first
                round may start anywhere: a run may go on from a checkpoint.
        """
        step = self._records[-1].end_step if self._records else record.start_step
        if (record.index, record.start_step) != (len(self), step):
            raise ValueError(
                f"round {record.index} from step {record.start_step} cannot follow: "
                f"round {len(self)} from step {step} is next"
            )
        self._records.append(record)

    def resize(self, sources: Sequence[int]) -> None:
        """The run goes on with these members (see ``resizes``)."""
        self.resizes[len(self)] = tuple(sources)

    @property
    def undone(self) -> list[bool]:
        """By round, whether a rollback undid its training."""
        return undone([record.restored for record in self], [record.kept for record in self])

    def ancestry(self, member: int) -> tuple[int | None, ...]:
        """For each round, the member whose training in that round ``member`` carries now.

        Args:
            member: index of a member after the last round, transfers included.

        Returns:
            One index per round; None for a round that was rolled back; ``CLAN`` (-1) if
            weights were averaged afterwards, so that ``member`` carries many members' training (see :meth:`shares`).
        """
        return tuple(None if held is None else _only(held) for held in self.shares(member))

    def shares(self, member: int) -> tuple[tuple[float, ...] | None, ...]:
        """For each round, every member's share in the weights that ``member`` carries now.

        A transfer passes on the whole share of all rounds before it. An average divides it by its mixing weights.

        Args:
            member: index of a member after the last round, transfers and averages included.

        Returns:
            Per round [members] shares that sum to 1, or None for a round that was rolled back.
        """
        held = self._before_resize(len(self), {member: 1.0})
        found: list[tuple[float, ...] | None] = []
        for record, is_undone in zip(reversed(self._records), reversed(self.undone), strict=True):
            before = None if is_undone else _before(record, held)
            found.append(before)
            if before is not None:
                held = {m: share for m, share in enumerate(before) if share}
            held = self._before_resize(record.index, held)
        return tuple(reversed(found))

    def _before_resize(self, index: int, held: Mapping[int, float]) -> dict[int, float]:
        """Shares in the members that there were before round ``index``."""
        if index not in self.resizes:
            return dict(held)
        before: dict[int, float] = {}
        for member, share in held.items():
            source = self.resizes[index][member]
            before[source] = before.get(source, 0.0) + share
        return before

    def to_json(self) -> dict[str, Any]:
        """Plain data that ``json.dumps`` takes."""
        plain = {"schema": SCHEMA, "kind": "lineage", "rounds": [_to_plain(record) for record in self._records]}
        resizes = {str(index): list(sources) for index, sources in self.resizes.items()}
        return plain | ({"resizes": resizes} if resizes else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Lineage:
        """The lineage that :meth:`to_json` wrote.

        Raises:
            ConfigError: if it is of another schema version, or no lineage.
        """
        if (data.get("kind"), data.get("schema")) != ("lineage", SCHEMA):
            raise ConfigError(
                f"this is {data.get('kind')!r} of schema {data.get('schema')!r}, not 'lineage' of schema {SCHEMA}. "
                f"Read it with the version of clantune_scale that wrote it."
            )
        resizes = {int(index): sources for index, sources in data.get("resizes", {}).items()}
        return cls(tuple(_from_plain(item) for item in data["rounds"]), resizes)


def _before(record: RoundRecord, held: Mapping[int, float]) -> tuple[float, ...]:
    """[members] shares before the round's end, from the shares held after it."""
    if record.average is not None:
        held = {m: weight for m, weight in enumerate(record.average) if weight}
    before = [0.0] * len(record.donors)
    for holder, share in held.items():
        before[record.donors[holder]] += share
    return tuple(before)


def _only(shares: tuple[float, ...]) -> int:
    holders = [member for member, share in enumerate(shares) if share]
    return holders[0] if len(holders) == 1 else CLAN


def _to_plain(record: RoundRecord) -> dict[str, Any]:
    plain = asdict(record)
    plain["phases"] = [{**asdict(phase), "kind": phase.kind.value} for phase in record.phases]
    plain["genomes"] = [{"values": dict(g.values), "step_sizes": dict(g.step_sizes)} for g in record.genomes]
    return plain


def _from_plain(item: Mapping[str, Any]) -> RoundRecord:
    return RoundRecord(
        index=item["index"],
        start_step=item["start_step"],
        phases=tuple(_phase(phase) for phase in item["phases"]),
        genomes=tuple(Genome(g["values"], g["step_sizes"]) for g in item["genomes"]),
        losses=tuple(item["losses"]),
        donors=tuple(item["donors"]),
        restored=item["restored"],
        kept=item.get("kept", True),  # absent in files of runs that took a snapshot after every round
        average=_tuple_or_none(item.get("average")),  # absent in files of runs that could not average yet
    )


def _phase(plain: Mapping[str, Any]) -> Phase:
    return Phase(**{**plain, "kind": PhaseKind(plain["kind"]), "teams": _tuple_or_none(plain.get("teams"))})


def _tuple_or_none(values: Sequence[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)
