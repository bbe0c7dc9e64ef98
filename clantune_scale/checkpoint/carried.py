"""A clan's own state in a checkpoint that the loop around it writes: what such a checkpoint does not hold yet.

The loop saves weights, optimizer and schedule, and restores them before the clan is attached. The clan adds its
population, its place in the rounds, averages, snapshots, and what it holds inside a round. Everything is plain: JSON
and tensors, so that ``torch.load(weights_only=True)`` reads it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from clantune_scale.checkpoint import fit
from clantune_scale.checkpoint.all_ranks import Everyone
from clantune_scale.checkpoint.capture import PHASE_START, ROLLBACK, clan_of
from clantune_scale.checkpoint.opening import Opening
from clantune_scale.checkpoint.restore import Target, restore_shared
from clantune_scale.checkpoint.run_state import RunProgress, RunView
from clantune_scale.config.schema import ClanConfig
from clantune_scale.errors import CheckpointError
from clantune_scale.tracking import create_run_dir
from clantune_scale.transfer import MemberState, Snapshot

#: Of the form of what is carried.
FORM = 1
TURNS_START = "turns/"
_OWN = ("average.", "line_")

Carried = dict[str, Any]


def carry(
    view: RunView,
    progress: RunProgress,
    state: MemberState,
    facts: Mapping[str, Any],
    *,
    run_dir: Path,
    num_events: int,
) -> Carried:
    """One rank's part, at the end of an optimizer step.

    Args:
        view: the clan on this rank.
        progress: of the run.
        state: this rank's live state.
        facts: settings and topology of the launch.
        run_dir: the run's folder.
        num_events: bytes of its events so far; 0 on ranks that write none.

    Returns:
        ``"shared"``, equal on all ranks but for the events' length, ``"rank"``, and ``"tensors"``, copies in host
        memory, equal on all ranks if each holds the whole model.
    """
    tensors = {name: tensor for name, tensor in state.tensors if name.startswith(_OWN)}
    rank: dict[str, Any] = {
        "counters": view.backend.counters(),
        "round_losses": list(progress.losses.round_losses),
        "samplers": [sampler.progress(view.phases.position.step) for sampler in progress.samplers],
    }
    for prefix, snapshot in {PHASE_START: progress.phase_snapshot, ROLLBACK: progress.rollback_snapshot}.items():
        if snapshot is not None:
            tensors |= {prefix + name: tensor for name, tensor in snapshot.tensors}
            rank[prefix] = snapshot.scalars
    shared = {
        **facts,
        "form": FORM,
        "run_dir": str(run_dir.resolve()),
        "events_bytes": num_events,
        "losses": progress.fitness.mean.tolist(),
        "clan": clan_of(view, progress, begun=True),
    }
    copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    return {"shared": shared, "rank": rank, "tensors": copies}


def with_phase(own: Carried, phase: dict[str, Any] | None) -> Carried:
    """What is carried, with what members hold of the present phase (``Members.carried``).

    The state at the phase's start is put beside the other tensors: it too is equal on ranks that hold the whole model.
    """
    if phase is None:
        return {**own, "phase": None}
    start = phase["start"]["tensors"]
    tensors = own["tensors"] | {TURNS_START + name: tensor for name, tensor in start.items()}
    return {**own, "tensors": tensors, "phase": {**phase, "start": {**phase["start"], "tensors": None}}}


def phase_of(carried: Carried) -> dict[str, Any] | None:
    """What :func:`with_phase` was given."""
    phase = carried["phase"]
    if phase is None:
        return None
    tensors = {n.removeprefix(TURNS_START): t for n, t in carried["tensors"].items() if n.startswith(TURNS_START)}
    return {**phase, "start": {**phase["start"], "tensors": tensors}}


def reopen(config: ClanConfig, everyone: Everyone, carried: Carried, *, take: Callable[[Path], None]) -> Opening:
    """Opens the run that a checkpoint belongs to: its own folder, or a new one if that is gone or in use.

    Args:
        config: the ``clantune`` block.
        everyone: all ranks; each calls this.
        carried: this rank's part of the checkpoint.
        take: called on the leader with the folder; raises a CheckpointError if another process works there.

    Raises:
        CheckpointError: if another version of the package wrote the checkpoint.
    """
    shared = carried["shared"]
    if shared["form"] != FORM:
        raise CheckpointError(
            f"the clan's part of the checkpoint has the form {shared['form']}, and this version reads {FORM}. Resume "
            f"with the version that wrote it."
        )
    said = everyone.from_leader(_folder_on_leader(config, shared, take) if everyone.is_leader else None)
    name = f"step-{shared['clan']['step']:08d}"
    content = {**shared, "events_bytes": said["events_bytes"]}
    return Opening(Path(said["run_dir"]), content, name, tuple(said["refused"]), is_carried=True)


def _folder_on_leader(config: ClanConfig, shared: Mapping[str, Any], take: Callable[[Path], None]) -> dict[str, Any]:
    before, refused = Path(shared["run_dir"]), []
    if before.is_dir():
        try:
            take(before)
            return {"run_dir": str(before), "events_bytes": shared["events_bytes"], "refused": []}
        except CheckpointError as error:
            refused.append(f"the run goes on in a folder of its own: {error}")
    run_dir = create_run_dir(config.tracking)
    take(run_dir)
    return {"run_dir": str(run_dir), "events_bytes": 0, "refused": refused}


def restore_carried(target: Target, carried: Carried) -> dict[str, Any]:
    """Loads this rank's part into a clan whose weights, optimizer and schedule are restored already.

    Returns:
        The rank's numbers.

    Raises:
        CheckpointError: if the arrays of this launch have other names or shapes.
    """
    view, progress = target.view, target.progress
    shared, numbers, tensors = carried["shared"], carried["rank"], carried["tensors"]
    restore_shared(view, progress, shared["clan"], range(view.config.population_size))
    target.prepare(True)
    own = {name: tensor for name, tensor in target.state().tensors if name.startswith(_OWN)}
    saved = {name: tensor for name, tensor in tensors.items() if name.startswith(_OWN)}
    difference = fit.layout_difference(_layout(saved), _layout(own))
    if difference is not None:
        raise CheckpointError(
            f"the clan's part of the checkpoint does not fit the model: {difference}. Build the model that the run was "
            f"started with, on as many ranks."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])
    view.backend.load_counters(numbers["counters"])
    progress.losses.begin_round(*numbers["round_losses"])
    if PHASE_START in numbers:
        progress.phase_snapshot = _snapshot(carried, PHASE_START)
    target.ensure_rollback_snapshot(_snapshot(carried, ROLLBACK) if ROLLBACK in numbers else None)
    return numbers


def _snapshot(carried: Carried, prefix: str) -> Snapshot:
    own = {name.removeprefix(prefix): t for name, t in carried["tensors"].items() if name.startswith(prefix)}
    return Snapshot.of(own, carried["rank"][prefix])


def _layout(tensors: Mapping[str, torch.Tensor]) -> list[list[Any]]:
    return [[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in tensors.items()]


def of_ranks(own: Carried) -> Carried:
    """What one checkpoint file holds of all ranks, each of which holds the whole model (a collective of all ranks).

    Args:
        own: this rank's part.

    Returns:
        The first rank's tensors, and each rank's rest as bytes.
    """
    rest = io.BytesIO()
    torch.save({key: value for key, value in own.items() if key != "tensors"}, rest)
    mine = torch.frombuffer(bytearray(rest.getbuffer()), dtype=torch.uint8)
    parts = _gathered(mine)
    return {"num_ranks": len(parts), "ranks": parts, "tensors": own["tensors"]}


def from_ranks(saved: Mapping[str, Any]) -> Carried:
    """This rank's part of what :func:`of_ranks` returned."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    rest = torch.load(io.BytesIO(saved["ranks"][rank].numpy().tobytes()), weights_only=True)
    return {**rest, "tensors": saved["tensors"]}


def _gathered(mine: torch.Tensor) -> list[torch.Tensor]:
    """Each rank's bytes, of any length, in host memory."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([mine.numel()], device=device))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: mine.numel()] = mine.to(device)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [part[: int(size)].cpu().clone() for part, size in zip(parts, sizes, strict=True)]
