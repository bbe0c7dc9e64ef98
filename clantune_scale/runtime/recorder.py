"""The record of a run: events while it goes on, and a summary at its end."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from clantune_scale.checkpoint.opening import VARIABLE, Opening
from clantune_scale.core.consensus import consensus
from clantune_scale.core.genome import Genome
from clantune_scale.core.lineage import RoundRecord
from clantune_scale.core.rounds import Phase, PhaseKind, Position, RoundPlan
from clantune_scale.core.strategies import Decision, Population
from clantune_scale.results.champion import Summary
from clantune_scale.runtime.diagnostics import Diagnostics
from clantune_scale.runtime.view import ClanView, Progress
from clantune_scale.tracking import KILLED, Tracking
from clantune_scale.tracking.events import SCHEMA, cut_events, to_plain
from clantune_scale.tracking.run_dir import ROUNDS, committed_rounds
from clantune_scale.tracking.uri import redact_command

_VERSIONS = ("clantune-scale", "torch", "deepspeed", "mlflow", "numpy", "scipy")


class Recorder:
    """Records what the clan does, as events and lineage.

    Every rank appends to the lineage (it is small, and decisions are equal). Only one rank writes events.

    Args:
        view: the clan on this rank.
        progress: of the run; its lineage and number of samples grow with each round.
        tokens_per_sample: token ids in a training sample, or None if samples hold none.

    Attributes:
        run_dir: the run's folder. All ranks know it: each writes its part of a round and of the champion there.
        tracking: where events go.
    """

    run_dir: Path
    tracking: Tracking

    def __init__(self, view: ClanView, progress: Progress, *, tokens_per_sample: int | None) -> None:
        self._view, self._progress, self._tokens_per_sample = view, progress, tokens_per_sample
        self._lost: str | None = None
        self._steps_since = 0

    def open(self, opening: Opening) -> None:
        """Opens the files of a new run, or of one that is continued: events after its last round are cut off."""
        self.run_dir = opening.run_dir
        is_writer = self._view.world.is_clan_leader
        if is_writer and opening.content is not None:
            self._lost = cut_events(self.run_dir / "events.jsonl", opening.content["events_bytes"])
        self.tracking = Tracking.open(
            self._view.config.tracking,
            run_dir=self.run_dir,
            is_writer=is_writer,
            continues=opening.content is not None,
        )

    @property
    def events_bytes(self) -> int:
        """Length of the events file now."""
        return self.tracking.num_bytes

    def warn(self, message: str) -> None:
        """Records a warning at the present step."""
        self.tracking.emit("warning", self._view.phases.position.step, message=message)

    def start(self) -> None:
        """Records the start of a new run."""
        view, topology = self._view, self._view.world.topology
        name = self.run_dir.name
        facts = {
            "run_id": name,
            "name": name,
            "population_size": view.config.population_size,
            "members": view.config.members,
            "rounded_to": _rounded_to(view.backend.masters()),
            "member_ranks": [
                topology.member_ranks(0 if view.has_one_state else member)
                for member in range(view.config.population_size)
            ],
            "topology": asdict(topology),
            "strategy": view.config.strategy.name,
            "genes": [asdict(gene) for gene in view.genes],
            "start_genome": {gene.name: gene.initial for gene in view.genes},
            "config": view.config,
            "batch": asdict(view.batch),
            "versions": _versions(),
            "hardware": _hardware(view.backend.device),
            "total_steps": view.strategy.facts.total_steps,
            "tokens_per_sample": self._tokens_per_sample,
            "initial_loss": float(self._progress.fitness.mean[0]),
            "command": redact_command(sys.argv),
            "resumed_from": None,
        }
        self.tracking.emit("run_start", view.phases.position.step, **facts)
        if view.world.is_clan_leader:
            manifest = {"schema": SCHEMA, "kind": "run", **to_plain(facts)}
            (self.run_dir / "run.json").write_text(json.dumps(manifest, indent=1))

    def resume(self, opening: Opening, sources: Sequence[int] | None) -> None:
        """Records that the run goes on from a committed round.

        Args:
            opening: the round.
            sources: by member, the member that it continues; None if each continues itself.
        """
        for complaint in opening.refused:
            warnings.warn(complaint, UserWarning, stacklevel=2)
            self.warn(complaint)
        self.go_on(str(opening.folder), sources)

    def go_on(self, source: str, sources: Sequence[int] | None = None) -> None:
        """Records that the run goes on from what was saved at ``source``; see :meth:`resume` for the rest."""
        view, position = self._view, self._view.phases.position
        self.tracking.emit(
            "resume",
            position.step,
            name=self.run_dir.name,
            resumed_from=source,
            round=position.plan.index,
            population_size=view.config.population_size,
            sources=None if sources is None else list(sources),
            total_steps=view.strategy.facts.total_steps,
            lost_events=self._lost,
            versions=_versions(),
            hardware=_hardware(view.backend.device),
            command=redact_command(sys.argv),
        )

    def stop(self, round_name: str | None) -> None:
        """Records that the run stops, and prints how to continue it.

        Args:
            round_name: the round that was committed at this step, or None if that failed.
        """
        if not self._view.world.is_clan_leader:
            return
        rounds = self.run_dir / ROUNDS
        known = committed_rounds(rounds)
        where = rounds / known[0] if known else None
        if round_name is None:
            self.warn("the state at the end could not be committed")
        self.tracking.close(KILLED)
        said = (
            f"continue with: export {VARIABLE}={shlex.quote(str(where))} and the launch of {redact_command(sys.argv)}"
            if where is not None
            else "no round was committed, so it cannot be continued"
        )
        self.tracking.say(f"clan {self.run_dir.name} stopped after {self._view.phases.position.step} steps; {said}")

    def phase_start(self, position: Position) -> None:
        """Records the start of a phase."""
        phase = position.phase
        self.tracking.emit(
            "phase_start", position.step, round=position.plan.index, phase=phase.kind.value, num_steps=phase.num_steps
        )

    def step(self, done: Position) -> None:
        """Counts an optimizer step; writes an event every ``tracking.print_every_steps``."""
        self._steps_since += 1
        if self._steps_since < self._view.config.tracking.print_every_steps and not done.ends_round:
            return
        loss, step_s = self._progress.losses.read(self._steps_since)
        self._steps_since = 0
        self.tracking.emit(
            "step",
            done.step + 1,
            round=done.plan.index,
            phase=done.phase.kind.value,
            loss=loss,
            step_s=step_s,
            samples=(done.step + 1) * self._view.batch.clan_batch,
        )

    def round_end(
        self,
        plan: RoundPlan,
        measured: Population,
        decision: Decision,
        diagnostics: Diagnostics,
        *,
        trained: tuple[Genome, ...],
        seconds: Mapping[str, float],
        complaints: Sequence[str],
        scheduled_lr: float | None,
    ) -> None:
        """Records the end of a round.

        Args:
            plan: of the round.
            measured: the population of the round.
            decision: from which the next population follows.
            diagnostics: of the round.
            trained: [members] the genomes that their states were trained with.
            seconds: by part of the round (kinds of phase, evaluation, transfer), wall-clock time.
            complaints: warnings about the data that members saw.
            scheduled_lr: the learning rate of the user's schedule, if there is one.
        """
        view, progress = self._view, self._progress
        progress.num_samples += sum(_samples_of(view, phase, measured) for phase in plan.phases)
        progress.lineage.append(RoundRecord.of(plan, trained, progress.fitness, decision))
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
            members=_members(progress, measured, decision, diagnostics),
            consensus=consensus(measured.genomes, view.genes),
            restored=decision.rolls_back,
            kept=decision.takes_snapshot and not decision.rolls_back,
            seconds=dict(seconds),
            lr_factor=view.strategy.lr_factor(plan.end_step - 1),
            learning_rates=diagnostics.learning_rate.tolist(),
            scheduled_rate=scheduled_lr,
            straggler=diagnostics.straggler,
            throughput=_throughput(view, plan, measured, seconds, self._tokens_per_sample),
            samples=progress.num_samples,
            tokens=progress.num_samples * self._tokens_per_sample if self._tokens_per_sample else None,
        )

    def finish(self, summary: Summary, *, status: str) -> None:
        """Records the end of the run, and where its results are."""
        self.tracking.emit(
            "run_end",
            self._view.phases.position.step,
            status=status,
            champion=summary.champion,
            champion_loss=summary.champion_loss,
            averaged=summary.averaged,
            artifacts=dict(summary.artifacts),
        )
        self.tracking.close(status)


def _samples_of(view: ClanView, phase: Phase, measured: Population) -> int:
    """Samples that all members together train on in a phase, at the accumulation of the start."""
    factor = phase.batch_factor
    if view.has_one_state:
        # Each turn trains on the whole batch; while members cooperate there is one.
        is_shared = phase.kind is PhaseKind.COOPERATIVE
        factor = 1 if is_shared else len({tuple(sorted(genome.values.items())) for genome in measured.genomes})
    return phase.num_steps * view.batch.clan_batch * factor


def _throughput(
    view: ClanView, plan: RoundPlan, measured: Population, seconds: Mapping[str, float], tokens: int | None
) -> dict[str, dict[str, float | None]]:
    """Steps, seconds, samples and tokens per second of the whole clan, by kind of phase."""
    table: dict[str, dict[str, float | None]] = {}
    for kind in dict.fromkeys(phase.kind for phase in plan.phases):
        phases = [phase for phase in plan.phases if phase.kind is kind]
        spent = max(seconds.get(kind.value, 0.0), 1e-9)
        samples_per_s = sum(_samples_of(view, phase, measured) for phase in phases) / spent
        table[kind.value] = {
            "steps": sum(phase.num_steps for phase in phases),
            "seconds": spent,
            "samples_per_s": samples_per_s,
            "tokens_per_s": samples_per_s * tokens if tokens else None,
        }
    return table


def _members(
    progress: Progress, measured: Population, decision: Decision, diagnostics: Diagnostics
) -> list[dict[str, Any]]:
    reasons = decision.reasons or ("",) * len(measured.genomes)
    return [
        {
            "member": member,
            "loss": float(progress.fitness.mean[member]),
            "standard_error": float(progress.fitness.standard_error[member]),
            "genome": asdict(genome),
            "donor": decision.donors[member],
            "reason": reasons[member],
            "next_genome": asdict(decision.population.genomes[member]),
            **diagnostics.of(member),
        }
        for member, genome in enumerate(measured.genomes)
    ]


def _rounded_to(weights: Sequence[torch.Tensor]) -> str | None:
    """The coarsest type of the weights that the optimizer updates; None if all have at least 24 bits."""
    half = {weight.dtype for weight in weights if weight.dtype in (torch.bfloat16, torch.float16)}
    return str(max(half, key=lambda dtype: torch.finfo(dtype).eps)).removeprefix("torch.") if half else None


def _hardware(device: torch.device) -> dict[str, Any]:
    """The machine of the rank that writes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"host": platform.node(), "device": name, "num_cpus": os.cpu_count()}


def _versions() -> dict[str, str]:
    """The versions that the run used; a package that is not installed (a bare checkout) is left out."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
