"""What a run leaves behind: its events as it goes; at the end the champion, the schedule and a picture."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clantune_scale.checkpoint.manifest import FOLDER, committed
from clantune_scale.checkpoint.opening import VARIABLE
from clantune_scale.core.consensus import consensus
from clantune_scale.core.lineage import Lineage, RoundRecord
from clantune_scale.core.rounds import Phase, Position, RoundPlan
from clantune_scale.core.strategies import Decision, Population
from clantune_scale.data.watch import LossMeter
from clantune_scale.runtime.diagnostics import Diagnostics
from clantune_scale.tracking import KILLED, Tracking
from clantune_scale.tracking.events import SCHEMA, cut_events, to_plain
from clantune_scale.tracking.uri import redact_command

if TYPE_CHECKING:
    from clantune_scale.runtime.clan import Clan

_VERSIONS = ("clantune-scale", "torch", "deepspeed", "mlflow", "numpy", "scipy")


@dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
        champion: the fittest member, or None where no loss was finite.
        champion_loss: its mean loss on the validation window.
        averaged: whether the champion's averaged weights were better than its last ones, and were kept.
        run_dir: the run's folder.
        artifacts: by name, files on the host that wrote them (the champion's own for its weights).
    """

    champion: int | None
    champion_loss: float
    averaged: bool = False
    run_dir: Path | None = None
    artifacts: Mapping[str, str] = field(default_factory=dict)


class Recorder:
    """Turns what the clan does into events and lineage.

    Every rank keeps the lineage (it is small, and decisions are equal); one rank writes events.

    Args:
        clan: whose run it is.
    """

    def __init__(self, clan: Clan) -> None:
        # All ranks know the folder: the champion's first rank writes into it, and every rank its part of a round.
        self.run_dir = clan.rounds.run_dir
        self.lineage = Lineage()
        self.samples = 0
        self._lost: str | None = None
        is_writer = clan.world.is_clan_leader
        if is_writer and clan.rounds.events_bytes is not None:
            self._lost = cut_events(self.run_dir / "events.jsonl", clan.rounds.events_bytes)
        self.tracking = Tracking.open(
            clan.config.tracking,
            run_dir=self.run_dir,
            is_writer=is_writer,
            continues=clan.rounds.events_bytes is not None,
        )
        self._steps_since = 0

    def start(self, clan: Clan) -> None:
        """The run begins."""
        topology = clan.world.topology
        name = self.run_dir.name
        facts = {
            "run_id": name,
            "name": name,
            "population_size": topology.population_size,
            "member_ranks": [topology.member_ranks(member) for member in range(topology.population_size)],
            "topology": asdict(topology),
            "strategy": clan.config.strategy.name,
            "genes": [asdict(gene) for gene in clan.genes],
            "start_genome": {gene.name: gene.initial for gene in clan.genes},
            "config": clan.config,
            "batch": asdict(clan.batch),
            "versions": _versions(),
            "hardware": _hardware(clan.backend.device),
            "total_steps": clan.strategy.facts.total_steps,
            "tokens_per_sample": clan.measurement.tokens_per_sample,
            "initial_loss": float(clan.fitness.mean[0]),
            "command": redact_command(sys.argv),
            "resumed_from": None,
        }
        self.tracking.emit("run_start", clan.phases.position.step, **facts)
        if clan.world.is_clan_leader:
            manifest = {"schema": SCHEMA, "kind": "run", **to_plain(facts)}
            (self.run_dir / "run.json").write_text(json.dumps(manifest, indent=1))

    def resume(self, clan: Clan) -> None:
        """The run goes on from a committed round."""
        position = clan.phases.position
        for complaint in clan.rounds.opening.refused:
            warnings.warn(complaint, UserWarning, stacklevel=2)
            self.tracking.emit("warning", position.step, message=complaint)
        self.tracking.emit(
            "resume",
            position.step,
            name=self.run_dir.name,
            resumed_from=str(clan.rounds.opening.folder),
            round=position.plan.index,
            population_size=clan.config.population_size,
            sources=clan.rounds.sources,
            total_steps=clan.strategy.facts.total_steps,
            lost_events=self._lost,
            versions=_versions(),
            hardware=_hardware(clan.backend.device),
            command=redact_command(sys.argv),
        )

    def stop(self, clan: Clan, round_name: str | None) -> None:
        """The run stops and can be continued: says from where."""
        if not clan.world.is_clan_leader:
            return
        rounds = self.run_dir / FOLDER
        known = committed(rounds)
        where = rounds / known[0] if known else None
        if round_name is None:
            self.tracking.emit(
                "warning", clan.phases.position.step, message="the state at the end could not be committed"
            )
        self.tracking.close(KILLED)
        said = (
            f"continue with: export {VARIABLE}={shlex.quote(str(where))} and the launch of {redact_command(sys.argv)}"
            if where is not None
            else "nothing was committed, so that it cannot be continued"
        )
        print(f"clan {self.run_dir.name} stopped after {clan.phases.position.step} steps; {said}", flush=True)

    def phase_start(self, clan: Clan, position: Position) -> None:
        """A phase begins."""
        phase = position.phase
        self.tracking.emit(
            "phase_start", position.step, round=position.plan.index, phase=phase.kind.value, num_steps=phase.num_steps
        )

    def step(self, clan: Clan, done: Position, losses: LossMeter) -> None:
        """An optimizer step is done; every few of them make a line."""
        self._steps_since += 1
        if self._steps_since < clan.config.tracking.print_every_steps and not done.ends_round:
            return
        loss, step_s = losses.read(self._steps_since)
        self._steps_since = 0
        self.tracking.emit(
            "step",
            done.step + 1,
            round=done.plan.index,
            phase=done.phase.kind.value,
            loss=loss,
            step_s=step_s,
            samples=(done.step + 1) * clan.batch.clan_batch,
        )

    def round_end(
        self,
        clan: Clan,
        plan: RoundPlan,
        measured: Population,
        decision: Decision,
        diagnostics: Diagnostics,
        seconds: Mapping[str, float],
        complaints: Sequence[str],
    ) -> None:
        """A round is over: ``measured`` was the population until now, ``decision`` made the next."""
        self.samples += sum(_samples_of(clan, phase) for phase in plan.phases)
        self.lineage.append(RoundRecord.of(plan, measured.genomes, clan.fitness, decision))
        for complaint in complaints:
            self.tracking.emit("warning", plan.end_step, message=complaint)
        self.tracking.emit(
            "round_end",
            plan.end_step,
            round=plan.index,
            start_step=plan.start_step,
            phases=[asdict(phase) for phase in plan.phases],
            explores=list(plan.explores),
            averaged=plan.uses_ema,
            average=decision.mixing_weights,
            members=_members(clan, measured, decision, diagnostics),
            consensus=consensus(measured.genomes, clan.genes),
            restored=decision.rolls_back,
            kept=decision.takes_snapshot and not decision.rolls_back,
            seconds=dict(seconds),
            lr_factor=clan.strategy.lr_factor(plan.end_step - 1),
            learning_rates=diagnostics.learning_rate.tolist(),
            scheduled_rate=clan.expression.scheduled_rate,
            straggler=diagnostics.straggler,
            throughput=_throughput(clan, plan, seconds),
            samples=self.samples,
            tokens=self.samples * clan.measurement.tokens_per_sample if clan.measurement.tokens_per_sample else None,
        )

    def finish(self, clan: Clan, summary: Summary, *, status: str) -> None:
        """The run is over: says where everything is."""
        self.tracking.emit(
            "run_end",
            clan.phases.position.step,
            status=status,
            champion=summary.champion,
            champion_loss=summary.champion_loss,
            averaged=summary.averaged,
            artifacts=dict(summary.artifacts),
        )
        self.tracking.close(status)


def _samples_of(clan: Clan, phase: Phase) -> int:
    """Samples that all members together train on in a phase, at the accumulation that they start with."""
    return phase.num_steps * clan.batch.clan_batch * phase.batch_factor


def _throughput(clan: Clan, plan: RoundPlan, seconds: Mapping[str, float]) -> dict[str, dict[str, float | None]]:
    """Steps, seconds, samples and tokens per second of the whole clan, by kind of phase."""
    table: dict[str, dict[str, float | None]] = {}
    for kind in dict.fromkeys(phase.kind for phase in plan.phases):
        phases = [phase for phase in plan.phases if phase.kind is kind]
        spent = max(seconds.get(kind.value, 0.0), 1e-9)
        samples_per_s = sum(_samples_of(clan, phase) for phase in phases) / spent
        tokens = clan.measurement.tokens_per_sample
        table[kind.value] = {
            "steps": sum(phase.num_steps for phase in phases),
            "seconds": spent,
            "samples_per_s": samples_per_s,
            "tokens_per_s": samples_per_s * tokens if tokens else None,
        }
    return table


def _members(clan: Clan, measured: Population, decision: Decision, diagnostics: Diagnostics) -> list[dict[str, Any]]:
    reasons = decision.reasons or ("",) * len(measured.genomes)
    return [
        {
            "member": member,
            "loss": float(clan.fitness.mean[member]),
            "standard_error": float(clan.fitness.standard_error[member]),
            "genome": asdict(genome),
            "donor": decision.donors[member],
            "reason": reasons[member],
            "next_genome": asdict(decision.population.genomes[member]),
            **diagnostics.of(member),
        }
        for member, genome in enumerate(measured.genomes)
    ]


def _hardware(device: torch.device) -> dict[str, Any]:
    """The first rank's machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"host": platform.node(), "device": name, "num_cpus": os.cpu_count()}


def _versions() -> dict[str, str]:
    """What the run was made with; a package that is not installed (a bare checkout) is left out."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
