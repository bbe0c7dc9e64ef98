"""A run's events as arrays over rounds and members: what the report draws and reasons from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clantune_scale.core.genome import Gene
from clantune_scale.errors import ClanError
from clantune_scale.tracking.background import Event

# Per member and round; those that events of an older run lack are nan throughout.
_MEASURED = ("loss", "standard_error", "gradient_norm", "drift", "alignment", "strikes")


@dataclass
class Run:
    """A run as far as it has come; R finished rounds, M members.

    Attributes:
        start: its ``run_start`` event.
        end: its ``run_end`` event; None while it goes on (or where it died without a word).
        genes: of its genomes.
        start_steps: [R] optimizer steps that were done before each round.
        end_steps: [R] optimizer steps that were done after it.
        measured: by name (loss, standard_error, gradient_norm, drift, alignment, strikes), [R, M] float64.
        values: by gene, [R, M]; what each member carried through the round.
        step_sizes: by gene, [R, M], scale units.
        consensus: by gene, [R]; the clan's one value.
        donors: [R, M] whose state each member received at the round's end; itself where it kept its own.
        restored: [R] bool; the clan went back to its last good state.
        explores: by round, the genes in which members might differ; None where the events do not say.
        rates: [R, M] learning rate of the first parameter group at the round's end.
        lr_factor: [R] the strategy's factor in it.
        seconds: by what they were spent on, [R].
        competitive: [K, 2] first and last step of every competitive phase.
        training: [S, 3] step, training loss and seconds per step.
        throughput: by phase kind, [samples, tokens or nan, seconds] in all.
        samples: trained by the clan so far; None where the events do not say.
        tokens: the same in tokens.
        stragglers: (step, member, rank, seconds) where a round had one.
        warnings: (step, message).
    """

    start: Event
    end: Event | None
    genes: tuple[Gene, ...]
    start_steps: np.ndarray
    end_steps: np.ndarray
    measured: dict[str, np.ndarray]
    values: dict[str, np.ndarray]
    step_sizes: dict[str, np.ndarray]
    consensus: dict[str, np.ndarray]
    donors: np.ndarray
    restored: np.ndarray
    explores: list[tuple[str, ...] | None]
    rates: np.ndarray
    lr_factor: np.ndarray
    seconds: dict[str, np.ndarray]
    competitive: np.ndarray
    training: np.ndarray
    throughput: dict[str, np.ndarray]
    samples: int | None
    tokens: int | None
    stragglers: list[tuple[int, int, int, float]]
    warnings: list[tuple[int, str]]

    @property
    def num_rounds(self) -> int:
        return len(self.end_steps)

    @property
    def num_members(self) -> int:
        return self.donors.shape[1]

    @property
    def num_steps(self) -> int:
        """Optimizer steps that were done in finished rounds."""
        return int(self.end_steps[-1])

    @property
    def loss(self) -> np.ndarray:
        """[R, M] mean loss on the common window; not finite where a member's was not."""
        return self.measured["loss"]

    @property
    def best(self) -> int:
        """The champion; the fittest member of the last round that had one where none is chosen yet."""
        if self.end is not None and self.end.get("champion") is not None:
            return int(self.end["champion"])
        fit = np.flatnonzero(np.isfinite(self.loss).any(axis=1))
        return int(np.nanargmin(np.where(np.isfinite(self.loss[fit[-1]]), self.loss[fit[-1]], np.nan))) if len(fit) else 0

    def ancestry(self, member: int) -> np.ndarray:
        """[R] who trained, in each round, the state that ``member`` carries now, as ``Lineage.ancestry`` has it.

        A round that was restored away has the member whose genome is carried on, as no state of it is.
        """
        ancestors = np.empty(self.num_rounds, dtype=int)
        for index in range(self.num_rounds - 1, -1, -1):
            member = ancestors[index] = self.donors[index, member]
        return ancestors

    def has(self, name: str) -> bool:
        """Whether the events carry this measurement at all."""
        return bool(np.isfinite(self.measured[name]).any())


def read_run(events: Iterable[Event], *, where: Path) -> Run:
    """The run that the events tell of.

    Args:
        events: oldest first; taken one at a time.
        where: their file, for messages.

    Raises:
        ClanError: if there is no ``run_start``, or no round was finished.
    """
    collected = _Collected()
    for event in events:
        collected.take(event)
    if collected.start is None:
        raise ClanError(f"{where} has no run_start event. Give the folder of a run that has started.")
    if not collected.end_steps:
        raise ClanError(f"{where} has no finished round yet, so that there is nothing to report. Wait for one round.")
    return collected.as_run()


@dataclass
class _Collected:
    """Rows as they come; each round's members become arrays at once, objects of a long run would not fit."""

    start: Event | None = None
    end: Event | None = None
    genes: tuple[Gene, ...] = ()
    start_steps: list[int] = field(default_factory=list)
    end_steps: list[int] = field(default_factory=list)
    rows: dict[tuple[str, str], list[np.ndarray]] = field(default_factory=dict)
    donors: list[np.ndarray] = field(default_factory=list)
    restored: list[bool] = field(default_factory=list)
    explores: list[tuple[str, ...] | None] = field(default_factory=list)
    seconds: list[Mapping[str, float]] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)
    competitive: list[tuple[int, int]] = field(default_factory=list)
    training: list[tuple[float, float, float]] = field(default_factory=list)
    throughput: dict[str, np.ndarray] = field(default_factory=dict)
    counted: dict[str, int | None] = field(default_factory=lambda: {"samples": None, "tokens": None})
    stragglers: list[tuple[int, int, int, float]] = field(default_factory=list)
    warnings: list[tuple[int, str]] = field(default_factory=list)

    def take(self, event: Event) -> None:
        kind = event["kind"]
        if kind == "run_start":
            self.start = event
            self.genes = tuple(_gene(data) for data in event["genes"])
        elif kind == "step":
            self.training.append((event["step"], event["loss"], event["step_s"]))
        elif kind == "warning":
            self.warnings.append((event["step"], event["message"]))
        elif kind == "round_end":
            self._take_round(event)
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
        self.explores.append(tuple(event["explores"]) if "explores" in event else None)
        self.seconds.append(event["seconds"])
        self.factors.append(event.get("lr_factor", 1.0))
        self._take_phases(event)
        if event.get("straggler"):
            late = event["straggler"]
            self.stragglers.append((event["step"], late["member"], late["rank"], late["seconds"]))

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
            tables.setdefault(table, {})[name] = np.stack(rows)
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
            donors=np.stack(self.donors),
            restored=np.array(self.restored, dtype=bool),
            explores=self.explores,
            rates=tables["rates"][""],
            lr_factor=np.array(self.factors),
            seconds={part: np.array([seconds.get(part, 0.0) for seconds in self.seconds]) for part in parts},
            competitive=np.array(self.competitive, dtype=int).reshape(-1, 2),
            training=np.array(self.training, dtype=np.float64).reshape(-1, 3),
            throughput=self.throughput,
            samples=self.counted["samples"],
            tokens=self.counted["tokens"],
            stragglers=self.stragglers,
            warnings=self.warnings,
        )


def _gene(data: Mapping[str, Any]) -> Gene:
    lists = {name: tuple(data[name]) for name in ("bounds", "groups") if data.get(name) is not None}
    return Gene(**{**data, **lists})
