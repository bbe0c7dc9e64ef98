"""One member's weights in the forms that others read: safetensors, torch's distributed checkpoint, the engine's own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from clantune_scale.checkpoint.all_ranks import Everyone
from clantune_scale.distributed.elastic.waiting import wait_while_ranks_live
from clantune_scale.distributed.groups import ReplicaGroup
from clantune_scale.errors import ClanError, ConfigError
from clantune_scale.results import weight_files

if TYPE_CHECKING:
    from clantune_scale.runtime.clan import Clan

STEM = "champion"


def check_forms(clan: Clan) -> None:
    """At the start of a run, not at its end.

    Raises:
        ConfigError: if this engine has no such form.
    """
    wants_own = "deepspeed" in clan.config.checkpoint.champion
    if wants_own and not hasattr(clan.backend, "save_checkpoint"):
        raise ConfigError(
            f"checkpoint.champion lists 'deepspeed', and the engine is {type(clan.backend.engine).__name__}. "
            f"Leave it out; 'dcp' can be loaded by any engine."
        )


def keep(clan: Clan, member: int, folder: Path, forms: Sequence[str], *, averaged: bool) -> dict[str, str]:
    """Writes a member's weights, as they are now, in each of ``forms``; all ranks of the clan call it.

    Args:
        clan: whose.
        member: which.
        folder: where to; made where it is not there. All of the member's hosts must see it.
        forms: of ``checkpoint.champion``.
        averaged: its averaged weights in place of those that train.

    Returns:
        By artifact, what was written.

    Raises:
        ClanError: on all ranks, if a file could not be written on one.
    """
    clan.transfers.require_consistent()
    everyone = Everyone(clan.world, clan.groups)
    written: dict[str, str] = {}
    problem = None
    # Who writes nothing waits for who does: a collective's deadline would be too short for a large model.
    with wait_while_ranks_live(
        clan.world, silence_s=clan.config.faults.deadline_s, run_dir=clan.rounds.run_dir
    ) as wait:
        with clan.measurement.averaged_weights() if averaged else nullcontext():
            if clan.member == member:
                # Whatever one rank meets, all must come to the meeting point: it is told there.
                try:
                    written = _write(clan, folder, forms, averaged)
                except (OSError, RuntimeError, SafetensorError) as error:
                    problem = f"{type(error).__name__}: {error}"
        _await_all(clan, wait)
    problems = everyone.gather(problem)
    found = [f"rank {rank}: {said}" for rank, said in enumerate(problems) if said is not None]
    if found:
        raise ClanError(
            f"member {member}'s weights could not be written to {folder} ({'; '.join(found[:3])}). Make room there or "
            f"mend it, and resume from the last committed round: nothing else was lost."
        )
    if clan.member == member and clan.world.at.member_rank == 0 and "safetensors" in written:
        weight_files.settle(folder, STEM, Path(written["safetensors"]).name)
    # Everyone is told of a file that is there, by the member that knows its name.
    return everyone.gather(written)[clan.world.topology.member_ranks(member)[0]]


def _write(clan: Clan, folder: Path, forms: Sequence[str], averaged: bool) -> dict[str, str]:
    """The champion's own ranks, each its part."""
    folder.mkdir(parents=True, exist_ok=True)
    at, size = clan.world.at, clan.world.topology.member_size
    inside = ReplicaGroup(clan.groups.member() if size > 1 else None, at.member_rank, size)
    written: dict[str, str] = {}
    weights = clan.backend.full_weights() if {"safetensors", "dcp"} & set(forms) else None
    if "safetensors" in forms:
        name = weight_files.write(
            weights,
            folder,
            STEM,
            gather=inside.gather_json,
            place=at.member_rank,
            max_bytes=clan.config.checkpoint.champion_file_bytes,
            metadata={"format": "pt", "averaged": str(averaged).lower()},
        )
        written["safetensors"] = str(folder / name)
    if "dcp" in forms:
        target = folder / f"{STEM}_dcp"
        _whole_folder(target, inside, lambda part: _write_dcp(weights or {}, part))
        written["dcp"] = str(target)
    if "deepspeed" in forms:
        target = folder / f"{STEM}_deepspeed"
        _whole_folder(target, inside, lambda part: clan.backend.save_checkpoint(part, STEM))
        written["deepspeed"] = str(target)
    return written


def _write_dcp(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Each rank's part, through torch's own call: the member is the default process group."""
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    save(weights, storage_writer=FileSystemWriter(folder))


def _whole_folder(target: Path, inside: ReplicaGroup, write: Callable[[Path], None]) -> None:
    """A folder that has its name only when all ranks have written into it."""
    part = target.with_name(f".{target.name}.partial")
    if inside.member == 0:
        shutil.rmtree(part, ignore_errors=True)
    inside.gather_json(None)
    write(part)
    inside.gather_json(None)
    if inside.member == 0:
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)


def _await_all(clan: Clan, wait: Callable[[str], None]) -> None:
    """Until every rank of the clan is here, however long one writes."""
    store, size = clan.world.store, clan.world.topology.world_size
    count = store.add("champion/arrived", 1)
    key = f"champion/{(count - 1) // size}"
    if count % size == 0:
        store.set(key, "")
    wait(key)
