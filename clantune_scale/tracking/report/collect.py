"""From a run's events to its arrays, one event at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clantune_scale.core.genome import Gene
from clantune_scale.core.lineage import undone
from clantune_scale.core.schedule import gene_from_plain
from clantune_scale.core.strategies.clan.overfitting import OVERFITS
from clantune_scale.errors import ClanError
from clantune_scale.tracking.background import Event
from clantune_scale.tracking.report.series import Run

_MEASURED = ("loss", "standard_error", "gradient_norm", "drift", "alignment", "strikes")


def read_run(events: Iterable[Event], *, where: Path) -> Run:
    """The run whose events these are.

    Args:
        events: oldest first; read one at a time.
        where: their file, for messages.

    Raises:
        ClanError: if there is no ``run_start``, or no finished round.
    """
    collected = _Collected()
    for event in events:
        collected.take(event)
    if collected.start is None:
        raise ClanError(f"{where} has no run_start event. Give the folder of a run that has started.")
    if not collected.end_steps:
        raise ClanError(f"{where} has no finished round yet, so there is nothing to report. Wait for one round.")
    return collected.as_run()


@dataclass
class _Collected:
    """Rows in the order of the events.

    Each round's members become arrays at once, because the objects of a long run would not fit into memory.
    """

    start: Event | None = None
    end: Event | None = None
    genes: tuple[Gene, ...] = ()
    start_steps: list[int] = field(default_factory=list)
    end_steps: list[int] = field(default_factory=list)
    rows: dict[tuple[str, str], list[np.ndarray]] = field(default_factory=dict)
    donors: list[np.ndarray] = field(default_factory=list)
    restored: list[bool] = field(default_factory=list)
    kept: list[bool] = field(default_factory=list)
    explores: list[tuple[str, ...] | None] = field(default_factory=list)
    seconds: list[Mapping[str, float]] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)
    scheduled: list[float | None] = field(default_factory=list)
    competitive: list[tuple[int, int]] = field(default_factory=list)
    training: list[tuple[float, float, float]] = field(default_factory=list)
    throughput: dict[str, np.ndarray] = field(default_factory=dict)
    counted: dict[str, int | None] = field(default_factory=lambda: {"samples": None, "tokens": None})
    stragglers: list[tuple[int, int, float]] = field(default_factory=list)
    overfitting: list[int] = field(default_factory=list)
    warnings: list[tuple[int, str]] = field(default_factory=list)

    def take(self, event: Event) -> None:
        kind = event["kind"]
        if kind == "run_start":
            self.start = event
            self.genes = tuple(gene_from_plain(gene) for gene in event["genes"])
        elif kind == "step":
            loss = math.nan if event["loss"] is None else event["loss"]
            self.training.append((event["step"], loss, event["step_s"]))
        elif kind == "warning":
            self.warnings.append((event["step"], event["message"]))
        elif kind == "round_end":
            self._take_round(event)
        elif kind == "resume" and event.get("sources") and self.donors:
            # The members are renumbered here. Each has the state that its source had after the last round.
            self.donors[-1] = self.donors[-1][event["sources"]]
        elif kind == "run_end":
            self.end = event

    def _take_round(self, event: Event) -> None:
        members = event["members"]
        self.start_steps.append(event["start_step"])
        self.end_steps.append(event["step"])
        for name in _MEASURED:
            self._row("measured", name, [member.get(name) for member in members])
        for gene in self.genes:
            self._row("values", gene.name, [member["genome"]["values"].get(gene.name) for member in members])
            self._row("step_sizes", gene.name, [member["genome"]["step_sizes"].get(gene.name) for member in members])
            self._row("consensus", gene.name, event["consensus"].get(gene.name))
        self._row("rates", "", event.get("learning_rates") or [None] * len(members))
        self.donors.append(np.array([member["donor"] for member in members]))
        self.restored.append(event["restored"])
        self.kept.append(event.get("kept", not event["restored"]))
        self.explores.append(tuple(event["explores"]) if "explores" in event else None)
        self.seconds.append(event["seconds"])
        self.factors.append(event.get("lr_factor", 1.0))
        self.scheduled.append(event.get("scheduled_rate"))
        self._take_phases(event)
        if any(OVERFITS in member["reason"] for member in members):
            self.overfitting.append(event["step"])
        if event.get("straggler"):
            late = event["straggler"]
            self.stragglers.append((event["step"], late["member"], late["seconds"]))

    def _take_phases(self, event: Event) -> None:
        at = event["start_step"]
        for phase in event["phases"]:
            if phase["kind"] == "competitive":
                self.competitive.append((at, at + phase["num_steps"]))
            at += phase["num_steps"]
        for kind, measured in (event.get("throughput") or {}).items():
            seconds = measured["seconds"]
            done = [(measured.get(unit) or math.nan) * seconds for unit in ("samples_per_s", "tokens_per_s")]
            self.throughput[kind] = self.throughput.get(kind, np.zeros(3)) + np.array([*done, seconds])
        for unit in self.counted:
            self.counted[unit] = event.get(unit) or self.counted[unit]

    def _row(self, table: str, name: str, row: Any) -> None:
        # None (not known) becomes nan.
        self.rows.setdefault((table, name), []).append(np.array(row, dtype=np.float64))

    def as_run(self) -> Run:
        assert self.start is not None
        tables: dict[str, dict[str, np.ndarray]] = {"values": {}, "step_sizes": {}, "consensus": {}}
        for (table, name), rows in self.rows.items():
            tables.setdefault(table, {})[name] = _stacked(rows)
        parts = dict.fromkeys(part for seconds in self.seconds for part in seconds)
        return Run(
            start=self.start,
            end=self.end,
            genes=self.genes,
            start_steps=np.array(self.start_steps),
            end_steps=np.array(self.end_steps),
            measured=tables["measured"],
            values=tables["values"],
            step_sizes=tables["step_sizes"],
            consensus=tables["consensus"],
            donors=_stacked(self.donors),
            restored=np.array(self.restored, dtype=bool),
            undone=np.array(undone(self.restored, self.kept), dtype=bool),
            explores=self.explores,
            rates=tables["rates"][""],
            lr_factor=np.array(self.factors),
            scheduled_rate=np.array(self.scheduled, dtype=np.float64),
            seconds={part: np.array([seconds.get(part, 0.0) for seconds in self.seconds]) for part in parts},
            competitive=np.array(self.competitive, dtype=int).reshape(-1, 2),
            training=np.array(self.training, dtype=np.float64).reshape(-1, 3),
            throughput=self.throughput,
            samples=self.counted["samples"],
            tokens=self.counted["tokens"],
            stragglers=self.stragglers,
            overfitting=self.overfitting,
            warnings=self.warnings,
        )


def _stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    """[rounds, members]: the rows. If the number of members has changed, all are as long as the longest.

    A member that was not there has no value (nan), and is its own donor.
    """
    width = max((row.size for row in rows if row.ndim), default=0)
    if all(row.size == width for row in rows if row.ndim):
        return np.stack(rows)
    lacking = np.arange(width) if rows[0].dtype.kind == "i" else np.full(width, np.nan)
    return np.stack([np.concatenate([row, lacking[row.size :]]) for row in rows])
