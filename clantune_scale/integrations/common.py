"""What integrations share: the block in a framework's loop, a clan's files in its checkpoints, figures to report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from clantune_scale.backends.torch.ddp import DDPBackend
from clantune_scale.backends.torch.loop_clan import LoopClan
from clantune_scale.backends.torch.plain import PlainBackend
from clantune_scale.checkpoint.opening import VARIABLE
from clantune_scale.config.schema import ClanConfig
from clantune_scale.data.containers import leaves_of
from clantune_scale.errors import CheckpointError, ConfigError
from clantune_scale.runtime.line.turns import is_plain

#: A clan's folder in a checkpoint.
FOLDER = "clan"
_COMPLETE = "complete.json"
#: What replicas of a model hold alike: the first rank writes it for all.
_SHARED = ("tensors", "phase", "rollback")


def block_in_loop(block: ClanConfig, *, loop: str, resume: str, directory: Path | None = None) -> ClanConfig:
    """The block as a run in a framework's loop has it: on the line, saved by the loop's checkpoints only.

    Args:
        block: the user's.
        loop: what the framework is called, for messages.
        resume: how the loop resumes, for messages.
        directory: where the run's folder goes if the block names none; None leaves the default.

    Raises:
        ConfigError: if it asks for members in groups, or for checkpoints or a resume of the clan's own.
    """
    if "members" in block.model_fields_set and block.members != "line":
        raise ConfigError(
            f'"members" is "groups", whose members are worlds of their own, and {loop} counts, shards and saves for '
            f'one world. Set "members" to "line", or leave it out.'
        )
    own = block.checkpoint
    if own.resume != "never" or os.environ.get(VARIABLE):
        asked = f"clantune.checkpoint.resume is {own.resume!r}" if own.resume != "never" else f"{VARIABLE} is set"
        raise ConfigError(
            f"{asked}, and in {loop} a clan resumes with the loop, which it cannot move. Leave it out and {resume}."
        )
    if "every_rounds" in own.model_fields_set and own.every_rounds is not None:
        raise ConfigError(
            f"clantune.checkpoint.every_rounds is {own.every_rounds}, and {loop} cannot go back to the clan's own "
            f"rounds. Leave it out: the checkpoints of {loop} hold the clan."
        )
    tracking = block.tracking
    if directory is not None and "directory" not in tracking.model_fields_set:
        tracking = tracking.model_copy(update={"directory": str(directory / tracking.directory)})
    checkpoint = own.model_copy(update={"every_rounds": None})
    return block.model_copy(update={"members": "line", "checkpoint": checkpoint, "tracking": tracking})


def require_plain_batch(batch: Any) -> None:
    """Refuses a micro-batch that a checkpoint inside a competitive phase could not hold.

    Raises:
        ConfigError: if a leaf is anything but a tensor, a number or a text.
    """
    odd = next((leaf for leaf in leaves_of(batch) if not is_plain(leaf)), None)
    if odd is not None:
        raise ConfigError(
            f"a batch holds a {type(odd).__name__}, which a clan cannot keep for its members' turns. Let the collator "
            f"give tensors, numbers and texts in any containers, or leave the competition out: "
            f'"strategy": {{"name": "clan", "options": {{"trial_cost": 0}}}}.'
        )


def save(clan: LoopClan, checkpoint: Path) -> None:
    """Writes the clan's part of a checkpoint into its folder; all ranks call it between two optimizer steps.

    Every rank writes a file. The mark that all have done so is written last.
    """
    rank, size = _place()
    folder = checkpoint / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _COMPLETE).unlink(missing_ok=True)
    state = clan.state_dict()
    if rank and _is_replicated(clan):
        state |= dict.fromkeys(_SHARED)
        if state["turns"] is not None:
            state["turns"]["start"]["tensors"] = {}
    path = _file(folder, rank)
    part = path.with_suffix(".partial")
    torch.save(state, part)
    part.replace(path)
    _barrier()
    if rank == 0:
        facts = {"world_size": size, "step": clan.num_steps, "run": clan.recorder.run_dir.name}
        (folder / _COMPLETE).write_text(json.dumps(facts))


def load(clan: LoopClan, checkpoint: Path) -> None:
    """Goes on from what :func:`save` wrote; all ranks call it once the loop has loaded its own part.

    Raises:
        CheckpointError: if the checkpoint holds no complete clan, or one of other ranks or settings.
    """
    rank, size = _place()
    folder = checkpoint / FOLDER
    try:
        facts = json.loads((folder / _COMPLETE).read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{checkpoint} holds no clan: it was saved without one, or while its saving was interrupted. Resume from "
            f"another checkpoint; or, to begin a clan with its weights, load them as a model and start a new run."
        ) from None
    if facts["world_size"] != size:
        raise CheckpointError(
            f"{checkpoint} was saved on {facts['world_size']} ranks and this launch has {size}, among which a clan's "
            f"state is not divided anew. Launch with {facts['world_size']} ranks."
        )
    state = _read(folder, rank)
    if rank and _is_replicated(clan):
        first = _read(folder, 0)
        state |= {key: first[key] for key in _SHARED}
        if state["turns"] is not None:
            state["turns"]["start"]["tensors"] = first["turns"]["start"]["tensors"]
    clan.load_state_dict(state, source=str(folder))


def figures(clan: LoopClan) -> dict[str, float]:
    """Of the last round, for a framework's reporters: what it measured, and what training goes on with."""
    record = clan.progress.lineage[len(clan.progress.lineage) - 1]
    losses = np.array([np.nan if loss is None else loss for loss in record.losses])
    found = {
        "clan/round": float(record.index),
        "clan/validation_loss": float(np.nanmin(losses)) if np.isfinite(losses).any() else float("nan"),
        "clan/rolled_back": float(record.restored),
        "clan/lr_factor": clan.lr_factor,
        "clan/learning_rate": clan.learning_rate(clan.num_steps),
    }
    for gene in clan.genes:
        name = f"clan/{gene.name}_multiplier" if gene.relative else f"clan/{gene.name}"
        # One model trains with the members' mean.
        found[name] = float(np.mean([genome.values[gene.name] for genome in clan.population.genomes]))
    return found


def _place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _is_replicated(clan: LoopClan) -> bool:
    """Whether all ranks hold the same tensors; engines that shard them do not."""
    return isinstance(clan.backend, DDPBackend | PlainBackend)


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.pt"


def _read(folder: Path, rank: int) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(_file(folder, rank), map_location="cpu", weights_only=True)
    return state
