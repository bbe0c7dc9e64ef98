"""Loads a committed round into a clan that has not trained yet, in place."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clantune_scale.checkpoint import manifest, reshard, shards
from clantune_scale.checkpoint.capture import (
    PHASE_START,
    RANKS,
    ROLLBACK,
    copy_from,
    pieces_of,
    population_from,
    rank_files,
    read_rank,
)
from clantune_scale.checkpoint.fit import PARAMETERS, layout_difference
from clantune_scale.checkpoint.run_state import RunProgress, RunView, SavedEngine
from clantune_scale.core.fitness import Fitness
from clantune_scale.core.lineage import Lineage
from clantune_scale.core.rounds import RoundPlan
from clantune_scale.distributed.self_check import parameter_layout
from clantune_scale.distributed.topology import Coordinates, Topology
from clantune_scale.errors import CheckpointError
from clantune_scale.transfer import MemberState, Snapshot
from clantune_scale.transfer.state import merged, optimizer_entries


def _is_laid_out(content: Mapping[str, Any], topology: Topology) -> bool:
    """Whether a member had as many ranks as it has now, in the same grid."""
    saved = content["topology"]
    return (saved["dp"], saved["pp"], saved["tp"]) == (topology.dp, topology.pp, topology.tp)


def fault_of(
    folder: Path, content: Mapping[str, Any], at: Coordinates, sources: Sequence[int], topology: Topology
) -> str | None:
    """What is wrong with the files that a rank reads, or None; other ranks' files only have to exist.

    Args:
        folder: the round's.
        content: its manifest.
        at: the rank's place.
        sources: by member of this launch, the member that it continues.
        topology: of this launch.
    """
    if content["begun"] and len(sources) != len(content["holders"]):
        return "it was stopped inside a round, and another number of members can only continue from the end of a round"
    source = sources[at.member]
    holder = content["holders"][source]
    own = {path.relative_to(folder).as_posix() for path in rank_files(folder, source, at.member_rank)}
    whole = (f"{RANKS}/{source:03d}-", f"{RANKS}/{holder:03d}-", f"{shards.member_folder(holder)}/")
    is_same = _is_laid_out(content, topology)
    for entry in manifest.files_of(content):
        reads = entry.path == "clan.json" or entry.path in own or shards.is_read_by(entry.path, holder, at)
        reads = reads or (not is_same and entry.path.startswith(whole))
        if reads:
            fault = entry.fault(folder)
            if fault is not None:
                return fault
        elif entry.path.startswith(f"{RANKS}/") and not (folder / entry.path).exists():
            return f"{entry.path} is missing"
    return None


def sources_of(content: Mapping[str, Any], population_size: int) -> list[int]:
    """By member of this launch, the member of the saved round that it continues.

    With as many members as before, each continues itself. With fewer, the fittest continue, in their order. With more,
    all continue, and the added ones are clones of the fittest, the second fittest and so on.
    """
    losses = content["losses"]
    ranking = sorted(range(len(losses)), key=lambda member: (losses[member], member))
    if population_size <= len(losses):
        return sorted(ranking[:population_size])
    added = population_size - len(losses)
    return [*range(len(losses)), *(ranking[place % len(ranking)] for place in range(added))]


@dataclass(frozen=True)
class Target:
    """What a round is loaded into on one rank.

    Attributes:
        view: the clan on this rank.
        progress: of the run; its fields are set.
        state: gives this rank's live state, whose tensors are written in place.
        prepare: makes what the state holds inside a round; told whether the round had begun.
    """

    view: RunView
    progress: RunProgress
    state: Callable[[], MemberState]
    prepare: Callable[[bool], None]

    def ensure_rollback_snapshot(self, snapshot: Snapshot | None = None) -> None:
        """If the strategy guards its members, sets the rollback snapshot; of the live state if none is given."""
        if self.view.strategy.guards:
            self.progress.rollback_snapshot = snapshot or Snapshot(self.state())


def restore_clan(target: Target, folder: Path, sources: Sequence[int]) -> dict[str, Any]:
    """Loads population, clock, lineage and this rank's state as they were when the round was captured.

    All ranks of a member call it, each for its own part.

    Args:
        target: what the round is loaded into.
        folder: the round's.
        sources: by member, the member that it continues.

    Returns:
        The rank's numbers, with ``"streams"`` as :class:`RandomStreams`.

    Raises:
        CheckpointError: if the state's parameters, shapes or types differ from this launch's.
    """
    data = json.loads((folder / "clan.json").read_bytes())
    restore_numbers(target, data, sources)
    numbers = _restore_rank(target, folder, 0 if target.view.has_one_state else sources[target.view.member])
    return {**numbers, "begun": data["begun"]}


def restore_numbers(target: Target, data: Mapping[str, Any], sources: Sequence[int]) -> None:
    """Loads population, clock and lineage, and makes the arrays of a round that had begun.

    Args:
        target: what they are loaded into.
        data: what :func:`clantune_scale.checkpoint.capture.numbers_of_clan` gave.
        sources: by member, the member that it continues.
    """
    view, progress = target.view, target.progress
    lineage = Lineage.from_json(data["lineage"])
    past = [RoundPlan(record.index, record.start_step, record.phases) for record in lineage]
    if past:
        past[-1] = replace(past[-1], uses_ema=data["averaged_before"])
    population = population_from(data["population"])
    progress.fitness = Fitness.from_losses([data["losses"][source] for source in sources])
    view.phases.resume(data["step"], past, population.teams, first_step=data["first_step"])
    progress.population = population
    if list(sources) != list(range(len(population.genomes))):
        view.phases.resume(data["step"], past, None, first_step=data["first_step"])
        progress.population = view.strategy.resized(population, sources, view.phases.position.plan)
        lineage.resize(sources)
    progress.lineage, progress.num_samples = lineage, data["samples"]
    target.prepare(data["begun"])


def _restore_rank(target: Target, folder: Path, source: int) -> dict[str, Any]:
    view, progress = target.view, target.progress
    at = view.world.at
    content = manifest.read(folder)
    holder = content["holders"][source]
    if not _is_laid_out(content, view.world.topology):
        return _restore_resharded(target, folder, content, source)
    numbers, streams = read_rank(folder, source, at.member_rank)
    state = _grown(target, numbers)
    copies = {
        prefix + name: torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
        for prefix in (PHASE_START, ROLLBACK)
        for name, shape, dtype in numbers.get(prefix, {}).get("layout", [])
    }
    shards.load({**dict(state.tensors), **copies}, folder / shards.member_folder(holder), at)
    _load_numbers(view, state, numbers)
    if view.backend.accumulation != numbers["accumulation"]:
        view.backend.accumulation = numbers["accumulation"]
    view.backend.load_counters(numbers["counters"])
    progress.losses.begin_round(*numbers["round_losses"])
    if PHASE_START in numbers:
        progress.phase_snapshot = copy_from(numbers, PHASE_START, copies)
    target.ensure_rollback_snapshot(copy_from(numbers, ROLLBACK, copies) if ROLLBACK in numbers else None)
    return {**numbers, "streams": streams}


def _restore_resharded(target: Target, folder: Path, content: Mapping[str, Any], source: int) -> dict[str, Any]:
    """Restores from another number of data-parallel ranks; added ranks keep this launch's random streams."""
    backend = target.view.backend
    holder, at = content["holders"][source], target.view.world.at
    saved = []
    for place in reshard.saved_places(at, content["topology"]):
        theirs, _ = read_rank(folder, holder, place.member_rank)
        saved.append((place, theirs))
    own_place = saved[at.dp % len(saved)][0]
    numbers, streams = read_rank(folder, source, own_place.member_rank)
    state = target.state()
    if state.grow is not None and optimizer_entries([name for name, *_ in numbers["layout"]], numbers["scalars"]):
        state.grow([f"optimizer.{index}." for index in range(len(backend.masters()))])
        state = target.state()
    live, known = pieces_of(state), [theirs["pieces"] for _, theirs in saved]
    if live is None or None in known or content["begun"]:
        num_saved = content["topology"]["dp"]
        raise CheckpointError(
            f"{folder.name} was saved on {num_saved} data-parallel ranks and this launch has {backend.dp_size}. This "
            f"engine's state, or a round that was stopped inside a phase, cannot be divided among another number of "
            f"ranks. Launch with {num_saved} data-parallel ranks per member."
        )
    rollback = _rollback_resharded(backend, folder / shards.member_folder(holder), live, state, saved, numbers)
    reshard.load(
        dict(state.tensors),
        reshard.pieces_from(live),
        folder / shards.member_folder(holder),
        [(place, reshard.pieces_from(theirs["pieces"]), theirs["layout"]) for place, theirs in saved],
    )
    _recount(backend, numbers["scalars"])
    _load_numbers(target.view, state, numbers)
    backend.load_counters(numbers["counters"])
    # The setter realigns the engine's accumulation boundary: the loaded counter placed it for another number of ranks.
    backend.accumulation = backend.accumulation
    target.ensure_rollback_snapshot(rollback)
    return {**numbers, "streams": streams if at.dp < len(saved) else None}


def _rollback_resharded(
    backend: SavedEngine,
    folder: Path,
    live: Mapping[str, list[list[Any]]],
    state: MemberState,
    saved: Sequence[tuple[Coordinates, dict[str, Any]]],
    numbers: dict[str, Any],
) -> Snapshot | None:
    """The rollback snapshot on another number of data-parallel ranks; None if it equals the saved state.

    Args:
        backend: the member's engine.
        folder: the member's, in the round's.
        live: where the live state's elements lie (:func:`pieces_of`).
        state: the live one.
        saved: by rank of the saved launch, its place and its numbers.
        numbers: of this rank's predecessor.
    """
    if ROLLBACK not in numbers:
        return None
    copies = {ROLLBACK + name: torch.empty_like(tensor, device="cpu") for name, tensor in state.tensors}
    reshard.load(
        copies,
        _prefixed(reshard.pieces_from(live)),
        folder,
        [
            (
                place,
                _prefixed(reshard.pieces_from(theirs["pieces"])),
                [[ROLLBACK + name, shape, dtype] for name, shape, dtype in theirs[ROLLBACK]["layout"]],
            )
            for place, theirs in saved
        ],
    )
    _recount(backend, numbers[ROLLBACK]["scalars"])
    return copy_from(numbers, ROLLBACK, copies)


def _prefixed(pieces: reshard.Pieces) -> reshard.Pieces:
    return {ROLLBACK + name: own for name, own in pieces.items()}


def _recount(backend: SavedEngine, scalars: dict[str, Any]) -> None:
    """Gives each of the present masters its step count; all masters have taken the same steps."""
    counts, size = scalars["optimizer"].get("counts"), len(backend.masters())
    if counts:
        scalars["optimizer"]["counts"] = (counts * size)[:size]


def check_parameters(view: RunView, folder: Path, sources: Sequence[int]) -> None:
    """Compares this rank's part of the model with the saved one, before any file of the run is changed.

    Args:
        view: the clan on this rank.
        folder: the round's.
        sources: by member, the member that it continues.

    Raises:
        CheckpointError: if they differ, unless ``checkpoint.allow`` names parameters.
    """
    content, at = manifest.read(folder), view.world.at
    place = at if _is_laid_out(content, view.world.topology) else reshard.saved_places(at, content["topology"])[0]
    numbers, _ = read_rank(folder, sources[view.member], place.member_rank)
    difference = layout_difference(numbers["parameters"], parameter_layout(view.backend.module))
    if difference is not None and PARAMETERS not in view.config.checkpoint.allow:
        raise CheckpointError(
            f"the model is not the one that was saved: {difference}. Build the model that the run was started with."
        )


def _grown(target: Target, numbers: Mapping[str, Any]) -> MemberState:
    """The live state, with the optimizer state that the saved one has."""
    names = [name for name, *_ in numbers["layout"]]
    state = target.state().with_optimizer_state(optimizer_entries(names, numbers["scalars"]))
    difference = layout_difference(numbers["layout"], state.manifest())
    if difference is not None:
        raise CheckpointError(
            f"member {target.view.member}'s state does not fit the one that was saved: {difference}. "
            f"Use the optimizer, precision, ZeRO stage and number of ranks that the run was started with."
        )
    return state


def _load_numbers(view: RunView, state: MemberState, numbers: Mapping[str, Any]) -> None:
    state.load_scalars(numbers["scalars"])
    for group, saved in zip(view.backend.param_groups(), numbers["groups"], strict=True):
        group.update({key: merged(group.get(key), value) for key, value in saved.items()})
    state.refresh()
