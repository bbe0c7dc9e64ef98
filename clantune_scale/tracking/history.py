"""A run read back from its events, finished or not: its genes, its lineage, its schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.lineage import Lineage, RoundRecord
from clantune_scale.core.rounds import Phase, PhaseKind
from clantune_scale.core.schedule import ClanSchedule, Segment, gene_from_plain
from clantune_scale.errors import ClanError

Event = Mapping[str, Any]


def start_of(events: Iterable[Event]) -> Event:
    """The ``run_start`` event.

    Raises:
        ClanError: if there is none.
    """
    for event in events:
        if event["kind"] == "run_start":
            return event
    raise ClanError("the events have no run_start, so the run had not started when they were read. Try again later.")


def rounds_of(events: Iterable[Event]) -> list[Event]:
    """The ``round_end`` events, in order."""
    return [event for event in events if event["kind"] == "round_end"]


def end_of(events: Iterable[Event]) -> Event | None:
    """The ``run_end`` event; None while the run goes on, or if it was killed at once."""
    return next((event for event in events if event["kind"] == "run_end"), None)


def genes_of(events: Iterable[Event]) -> tuple[Gene, ...]:
    """The genes of the run's genomes."""
    return tuple(gene_from_plain(gene) for gene in start_of(events)["genes"])


def champion_of(events: Sequence[Event]) -> int:
    """The champion if the run has ended with one, else the member with the lowest loss in the last round.

    Raises:
        ClanError: if no round was finished, or no loss in the last one was finite.
    """
    end = end_of(events)
    if end is not None and end.get("champion") is not None:
        return end["champion"]
    rounds = rounds_of(events)
    if not rounds:
        raise ClanError("no round is finished, so there is no champion yet. Try again after the first round.")
    finite = [m for m in rounds[-1]["members"] if _finite(m["loss"]) is not None]
    if not finite:
        raise ClanError(f"no member had a finite loss in round {rounds[-1]['round']}. Name one with --member.")
    return min(finite, key=lambda member: member["loss"])["member"]


def lineage_from_events(events: Iterable[Event]) -> Lineage:
    """The lineage that the clan kept: one record per finished round.

    Args:
        events: as :func:`clantune_scale.tracking.read_events` gives them.
    """
    lineage = Lineage()
    for event in events:
        if event["kind"] == "round_end":
            lineage.append(_record(event))
        elif event["kind"] == "resume" and event.get("sources"):
            lineage.resize(event["sources"])
    return lineage


def schedule_from_events(events: Sequence[Event], *, member: int | None = None) -> ClanSchedule:
    """The schedule that trained the weights which ``member`` has after the last finished round.

    The factor on learning rates is recorded at each round's last step. Between these steps it is taken as linear, and
    as continuous from 1 on: that is how strategies compute it.

    Args:
        events: of the run.
        member: whose ancestry to follow; the champion's if None.

    Raises:
        ClanError: if no round was finished, or there is no such member.
    """
    genes, lineage = genes_of(events), lineage_from_events(events)
    chosen = champion_of(events) if member is None else member
    # A resumed run may have another number of members.
    size = len(rounds_of(events)[-1]["members"])
    if not 0 <= chosen < size:
        raise ClanError(f"there is no member {chosen} in a clan of {size}. Give 0 to {size - 1}.")
    schedule = ClanSchedule.from_lineage(lineage, genes, member=chosen)
    factors = _factors(rounds_of(events))
    segments = (replace(segment, lr_factor=_within(segment, factors)) for segment in schedule.segments)
    return replace(schedule, segments=tuple(segments))


def _record(event: Event) -> RoundRecord:
    members = event["members"]
    return RoundRecord(
        index=event["round"],
        start_step=event["start_step"],
        phases=tuple(_phase(phase) for phase in event["phases"]),
        genomes=tuple(Genome(m["genome"]["values"], m["genome"].get("step_sizes", {})) for m in members),
        losses=tuple(_finite(m["loss"]) for m in members),
        donors=tuple(m["donor"] for m in members),
        restored=event.get("restored", False),
        kept=event.get("kept", True),
        average=tuple(event["average"]) if event.get("average") else None,
    )


def _phase(plain: Mapping[str, Any]) -> Phase:
    known = {key: value for key, value in plain.items() if key in Phase.__dataclass_fields__}
    teams = known.pop("teams", None)
    # Events of older runs have no teams.
    given = {"teams": tuple(teams)} if teams is not None else {}
    return Phase(**{**known, **given, "kind": PhaseKind(plain["kind"])})


def _finite(loss: float | None) -> float | None:
    return loss if loss is not None and math.isfinite(loss) else None


def _factors(rounds: Sequence[Event]) -> list[tuple[int, int, float, float]]:
    """(start step, end step, factor in the first step, factor in the step after the last) of each round."""
    lines = []
    first = 1.0
    for event in rounds:
        start, end, recorded = event["start_step"], event["step"], event.get("lr_factor", 1.0)
        slope = (recorded - first) / (end - 1 - start) if end - 1 > start else 0.0
        # Rounding could take a line that reaches zero below it.
        last = max(recorded + slope, 0.0)
        lines.append((start, end, first, last))
        first = last
    return lines


def _within(segment: Segment, lines: Sequence[tuple[int, int, float, float]]) -> tuple[float, float]:
    start, end, first, last = next(line for line in lines if line[0] <= segment.start_step < line[1])

    def at(step: int) -> float:
        return first + (last - first) * (step - start) / (end - start)

    return at(segment.start_step), at(segment.end_step)
