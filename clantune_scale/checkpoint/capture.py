"""One rank's copy of a run's state at the end of an optimizer step. Training continues while it is written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from clantune_scale.checkpoint.files import write_new
from clantune_scale.checkpoint.run_state import RunProgress, RunView
from clantune_scale.checkpoint.streams import RandomStreams
from clantune_scale.core.genome import Genome
from clantune_scale.core.strategies import Population
from clantune_scale.distributed.self_check import parameter_layout
from clantune_scale.distributed.topology import Coordinates
from clantune_scale.transfer import MemberState, Snapshot
from clantune_scale.transfer.state import plain

RANKS = "ranks"
PHASE_START, ROLLBACK = "phase/", "rollback/"


@dataclass(frozen=True)
class Capture:
    """What one rank writes.

    Attributes:
        tensors: by name, in host memory: the live state, the phase snapshot and the rollback snapshot.
        numbers: the rest that this rank needs to resume; JSON-serializable.
        streams: this rank's random streams.
        clan: the state that all ranks share; JSON-serializable.
    """

    tensors: dict[str, torch.Tensor]
    numbers: dict[str, Any]
    streams: RandomStreams
    clan: dict[str, Any]

    @classmethod
    def take(
        cls, view: RunView, progress: RunProgress, state: MemberState, *, begun: bool, rollback_is_live: bool
    ) -> Capture:
        """Copies the state.

        Args:
            view: the clan on this rank.
            progress: of the run.
            state: this rank's live state.
            begun: false at a round's end, before the next phase begins.
            rollback_is_live: whether the rollback snapshot equals the present state.
        """
        lent: list[Snapshot] = []
        rollback = progress.rollback_snapshot
        if rollback is not None and rollback_is_live and rollback.layout() == state.manifest():
            # A snapshot that is lent is not written to, so a second copy of the same state is not needed.
            tensors = dict(rollback.tensors)
            lent.append(rollback)
        else:
            tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.tensors}
        numbers = {
            "scalars": state.scalars,
            "groups": [plain(_settings(group)) for group in view.backend.param_groups()],
            "counters": view.backend.counters(),
            "accumulation": view.backend.accumulation,
            "round_losses": progress.losses.round_losses,
            "samplers": [sampler.progress(view.phases.position.step) for sampler in progress.samplers],
            "layout": state.manifest(),
            "parameters": parameter_layout(view.backend.module),
            "pieces": pieces_of(state),
        }
        for prefix, snapshot in {
            PHASE_START: progress.phase_snapshot,
            ROLLBACK: None if rollback_is_live else rollback,
        }.items():
            if snapshot is not None:
                lent.append(snapshot)
                tensors |= {prefix + name: tensor for name, tensor in snapshot.tensors}
                numbers[prefix] = {"scalars": snapshot.scalars, "layout": snapshot.layout()}
        of_clan = numbers_of_clan(view, progress, begun=begun)
        capture = cls(tensors, numbers, RandomStreams.capture(view.backend), of_clan)
        for snapshot in lent:
            snapshot.lend(capture)
        return capture

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank's tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def write_rank(self, folder: Path, at: Coordinates) -> list[Path]:
        """Writes numbers and random streams into a round's folder; returns the files."""
        numbers, streams = rank_files(folder, at.member, at.member_rank)
        write_new(numbers, json.dumps({**self.numbers, "streams": self.streams.numbers}).encode())
        save_file(self.streams.tensors, streams)
        with open(streams, "rb+") as file:
            os.fsync(file.fileno())
        return [numbers, streams]


def pieces_of(state: MemberState) -> dict[str, list[list[Any]]] | None:
    """Where each tensor's elements lie in the whole model, JSON-serializable; None if the engine does not know."""
    known = state.logical() if state.logical is not None else None
    if known is None:
        return None
    # Averaged weights, and what members on the line store of a round, are sharded as the masters are.
    for name, _ in state.tensors:
        kind, _, index = name.partition(".")
        if is_clans_own(name):
            known[name] = [replace(piece, key=f"{kind}/{piece.key}") for piece in known[f"master.{index}"]]
    return {name: [list(astuple(piece)) for piece in pieces] for name, pieces in known.items()}


def is_clans_own(name: str) -> bool:
    """Whether a tensor of the state is the clan's and not the engine's: averages, what the line stores of a round."""
    return name.startswith(("average.", "line_"))


def rank_files(folder: Path, member: int, member_rank: int) -> tuple[Path, Path]:
    """A rank's numbers and its random streams."""
    stem = folder / RANKS / f"{member:03d}-{member_rank:03d}"
    return stem.with_suffix(".json"), stem.with_suffix(".safetensors")


def read_rank(folder: Path, member: int, member_rank: int) -> tuple[dict[str, Any], RandomStreams]:
    """What :meth:`Capture.write_rank` wrote."""
    numbers_path, streams_path = rank_files(folder, member, member_rank)
    numbers = json.loads(numbers_path.read_bytes())
    return numbers, RandomStreams(load_file(streams_path), numbers["streams"])


def copy_from(numbers: Mapping[str, Any], prefix: str, tensors: Mapping[str, torch.Tensor]) -> Snapshot:
    """The snapshot that was written under ``prefix``."""
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return Snapshot.of(own, numbers[prefix]["scalars"])


def population_from(data: Mapping[str, Any]) -> Population:
    """The population in :func:`numbers_of_clan`."""
    genomes = tuple(Genome(genome["values"], genome["step_sizes"]) for genome in data["genomes"])
    return Population(genomes, data["memory"], None if data["teams"] is None else tuple(data["teams"]))


def numbers_of_clan(view: RunView, progress: RunProgress, *, begun: bool) -> dict[str, Any]:
    """What all ranks share of a run; JSON-serializable. :class:`Capture` says what ``begun`` is."""
    return {
        "step": view.phases.position.step,
        "first_step": view.phases.first_step,
        "begun": begun,
        "population": asdict(progress.population),
        "losses": progress.fitness.losses.tolist(),
        "lineage": progress.lineage.to_json(),
        "averaged_before": view.phases.averaged_before,
        "samples": progress.num_samples,
    }


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}
