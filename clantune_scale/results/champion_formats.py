"""One member's weights as safetensors, as torch's distributed checkpoint, or in the engine's own format."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from clantune_scale.checkpoint.all_ranks import Everyone
from clantune_scale.checkpoint.run_state import RunView, SavedEngine
from clantune_scale.distributed.elastic.waiting import wait_while_ranks_live
from clantune_scale.distributed.groups import ReplicaGroup
from clantune_scale.errors import ClanError, ConfigError
from clantune_scale.results import weight_files

STEM = "champion"


class WholeWeights(SavedEngine, Protocol):
    """An engine that gives a member's whole weights."""

    def full_weights(self) -> dict[str, torch.Tensor] | None:
        """The member's weights and buffers by name, in host memory, each on one of its ranks (a member collective)."""


class MeasuredView(RunView, Protocol):
    """One rank's clan, as far as its champion is written from it."""

    @property
    def backend(self) -> WholeWeights: ...


@dataclass(frozen=True)
class ChampionWeights:
    """Which weights are written, and from where.

    Attributes:
        member: whose.
        averaged: whether they are the averaged weights.
        in_place: enters a context in which the member's model computes with them.
        run_dir: the run's folder.
    """

    member: int
    averaged: bool
    in_place: AbstractContextManager[Any]
    run_dir: Path


def check_forms(forms: Sequence[str], engine: Any, backend: object) -> None:
    """Refuses forms that the engine cannot write: at the start of a run, not at its end.

    Args:
        forms: of ``checkpoint.champion``.
        engine: that the user trains with, for the message.
        backend: that writes them.

    Raises:
        ConfigError: if the backend has no such form.
    """
    if "deepspeed" in forms and not hasattr(backend, "save_checkpoint"):
        raise ConfigError(
            f"checkpoint.champion lists 'deepspeed', and the engine is {type(engine).__name__}. "
            f"Leave it out; 'dcp' can be loaded by any engine."
        )


def write_weights(view: MeasuredView, weights: ChampionWeights, folder: Path, forms: Sequence[str]) -> dict[str, str]:
    """Writes a member's weights, as they are now, in each of ``forms``; all ranks of the clan call it.

    Args:
        view: the clan on this rank.
        weights: which.
        folder: made if it does not exist. All of the member's hosts must see it.
        forms: of ``checkpoint.champion``.

    Returns:
        By form, the path that was written.

    Raises:
        ClanError: on all ranks, if a file could not be written on one.
    """
    world, member = view.world, weights.member
    everyone = Everyone(world, view.groups)
    written: dict[str, str] = {}
    problem = None
    # Ranks that write nothing wait for the others. A collective's timeout would be too short for a large model.
    with wait_while_ranks_live(world, silence_s=view.config.faults.deadline_s, run_dir=weights.run_dir) as wait:
        with weights.in_place:
            if view.member == member:
                # A rank that fails must still reach the gather below, where all ranks learn of it.
                try:
                    written = _write(view, folder, forms, averaged=weights.averaged)
                except (OSError, RuntimeError, SafetensorError) as error:
                    problem = f"{type(error).__name__}: {error}"
        _await_all(view, wait)
    problems = everyone.gather(problem)
    found = [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text is not None]
    if found:
        raise ClanError(
            f"member {member}'s weights could not be written to {folder} ({'; '.join(found[:3])}). Free space "
            f"there or choose another folder, and resume from the last committed round: nothing else was lost."
        )
    if view.member == member and world.at.member_rank == 0 and "safetensors" in written:
        weight_files.settle(folder, STEM, Path(written["safetensors"]).name)
    # Only the member that wrote the files knows their names.
    return everyone.gather(written)[world.topology.member_ranks(member)[0]]


def _write(view: MeasuredView, folder: Path, forms: Sequence[str], *, averaged: bool) -> dict[str, str]:
    """Called on the champion's ranks, each of which writes its part."""
    folder.mkdir(parents=True, exist_ok=True)
    at, size = view.world.at, view.world.topology.member_size
    inside = ReplicaGroup(view.groups.member() if size > 1 else None, at.member_rank, size)
    written: dict[str, str] = {}
    weights = view.backend.full_weights() if {"safetensors", "dcp"} & set(forms) else None
    if "safetensors" in forms:
        name = weight_files.write(
            weights,
            folder,
            STEM,
            gather=inside.gather_json,
            place=at.member_rank,
            max_bytes=view.config.checkpoint.champion_file_bytes,
            metadata={"format": "pt", "averaged": str(averaged).lower()},
        )
        written["safetensors"] = str(folder / name)
    if "dcp" in forms:
        target = folder / f"{STEM}_dcp"
        _whole_folder(target, inside, lambda part: _write_dcp(weights or {}, part))
        written["dcp"] = str(target)
    if "deepspeed" in forms:
        target = folder / f"{STEM}_deepspeed"
        _whole_folder(target, inside, lambda part: _engine_checkpoint(view.backend, part))
        written["deepspeed"] = str(target)
    return written


def _engine_checkpoint(backend: Any, folder: Path) -> None:
    """The engine's own format; :func:`check_forms` made sure that this backend has one."""
    backend.save_checkpoint(folder, STEM)


def _write_dcp(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes this rank's part with torch's own call: the member is the default process group."""
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    save(weights, storage_writer=FileSystemWriter(folder))


def _whole_folder(target: Path, inside: ReplicaGroup, write: Callable[[Path], None]) -> None:
    """Writes a folder that gets its name only when all ranks have written into it."""
    part = target.with_name(f".{target.name}.partial")
    if inside.member == 0:
        shutil.rmtree(part, ignore_errors=True)
    inside.gather_json(None)
    write(part)
    inside.gather_json(None)
    if inside.member == 0:
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)


def _await_all(view: MeasuredView, wait: Callable[[str], None]) -> None:
    """Waits until every rank of the clan is here, however long one writes."""
    store, size = view.world.store, view.world.topology.world_size
    count = store.add("champion/arrived", 1)
    key = f"champion/{(count - 1) // size}"
    if count % size == 0:
        store.set(key, "")
    wait(key)
