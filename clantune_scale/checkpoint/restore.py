"""Puts a committed round into a clan that has just been built, in place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from clantune_scale.core.fitness import Fitness
from clantune_scale.core.lineage import Lineage
from clantune_scale.core.rounds import RoundPlan
from clantune_scale.distributed.self_check import parameter_layout
from clantune_scale.distributed.topology import Coordinates, Topology
from clantune_scale.errors import CheckpointError
from clantune_scale.transfer import MemberState, Snapshot
from clantune_scale.transfer.state import merged

if TYPE_CHECKING:
    from clantune_scale.runtime.clan import Clan


def _is_laid_out(content: Mapping[str, Any], topology: Topology) -> bool:
    """Whether a member was then as many ranks as it is now, in the same grid."""
    saved = content["topology"]
    return (saved["dp"], saved["pp"], saved["tp"]) == (topology.dp, topology.pp, topology.tp)


def fault_of(
    folder: Path, content: Mapping[str, Any], at: Coordinates, sources: Sequence[int], topology: Topology
) -> str | None:
    """What is wrong with the files that a rank reads; the others' only have to be there.

    Args:
        folder: the round's.
        content: its manifest.
        at: the rank's place.
        sources: by member of this launch, the member that it continues.
        topology: of this launch.
    """
    if content["begun"] and len(sources) != len(content["holders"]):
        return "it was stopped inside a round, and another number of members can go on from a round's end alone"
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

    As many as there were: each its own. Fewer: the fittest of the round stay, in their order. More: all stay, and
    the others are clones of the fittest, the second fittest and so on.
    """
    losses = content["losses"]
    ranking = sorted(range(len(losses)), key=lambda member: (losses[member], member))
    if population_size <= len(losses):
        return sorted(ranking[:population_size])
    added = population_size - len(losses)
    return [*range(len(losses)), *(ranking[place % len(ranking)] for place in range(added))]


def restore_clan(clan: Clan, folder: Path, sources: Sequence[int]) -> dict[str, Any]:
    """Population, clock, lineage and this rank's state as they were when the round was captured.

    All ranks of a member call it, each for its own part.

    Returns:
        What is left for the caller: the rank's numbers, with ``"streams"`` as :class:`RandomStreams`.

    Raises:
        CheckpointError: if the state has other parameters, shapes or types than this launch's.
    """
    data = json.loads((folder / "clan.json").read_bytes())
    lineage = Lineage.from_json(data["lineage"])
    past = [RoundPlan(record.index, record.start_step, record.phases) for record in lineage]
    if past:
        past[-1] = replace(past[-1], uses_ema=data["averaged_before"])
    population = population_from(data["population"])
    clan.fitness = Fitness.from_losses([data["losses"][source] for source in sources])
    clan.phases.resume(data["step"], past, population.teams)
    clan.population = population
    if list(sources) != list(range(len(population.genomes))):
        clan.phases.resume(data["step"], past, None)
        clan.population = clan.strategy.resized(population, sources, clan.phases.position.plan)
        lineage.resize(sources)
    clan.recorder.lineage, clan.recorder.samples = lineage, data["samples"]
    numbers = _restore_rank(clan, folder, sources[clan.member])
    return {**numbers, "begun": data["begun"]}


def _restore_rank(clan: Clan, folder: Path, source: int) -> dict[str, Any]:
    content = manifest.read(folder)
    holder = content["holders"][source]
    if not _is_laid_out(content, clan.world.topology):
        return _restore_resharded(clan, folder, content, source)
    numbers, streams = read_rank(folder, source, clan.world.at.member_rank)
    state = _grown(clan, numbers)
    copies = {
        prefix + name: torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
        for prefix in (PHASE_START, ROLLBACK)
        for name, shape, dtype in numbers.get(prefix, {}).get("layout", [])
    }
    shards.load({**dict(state.tensors), **copies}, folder / shards.member_folder(holder), clan.world.at)
    _load_numbers(clan, state, numbers)
    if clan.backend.accumulation != numbers["accumulation"]:
        clan.backend.accumulation = numbers["accumulation"]
    clan.backend.load_counters(numbers["counters"])
    clan.losses.begin_round(*numbers["round_losses"])
    for prefix, attribute in ((PHASE_START, "phase_snapshot"), (ROLLBACK, "rollback_snapshot")):
        if prefix in numbers:
            setattr(clan, attribute, copy_from(numbers, prefix, copies))
    if clan.strategy.guards and clan.rollback_snapshot is None:
        clan.rollback_snapshot = Snapshot(clan.state())
    return {**numbers, "streams": streams}


def _restore_resharded(clan: Clan, folder: Path, content: Mapping[str, Any], source: int) -> dict[str, Any]:
    """The same on another number of data-parallel ranks; streams of ranks that there were not begin anew."""
    holder, at = content["holders"][source], clan.world.at
    saved = []
    for place in reshard.saved_places(at, content["topology"]):
        theirs, _ = read_rank(folder, holder, place.member_rank)
        saved.append((place, theirs))
    own_place = saved[at.dp % len(saved)][0]
    numbers, streams = read_rank(folder, source, own_place.member_rank)
    state = clan.state()
    if state.grow is not None and any(name.startswith("optimizer.") for name, *_ in numbers["layout"]):
        state.grow([f"optimizer.{index}." for index in range(len(clan.backend.masters()))])
        state = clan.state()
    live, known = pieces_of(state), [theirs["pieces"] for _, theirs in saved]
    if live is None or None in known or content["begun"]:
        raise CheckpointError(
            f"{folder.name} was saved on {content['topology']['dp']} data-parallel ranks and this launch has "
            f"{clan.backend.dp_size}: this engine's state, or one that was stopped inside a round, goes on with as "
            f"many alone. Launch with as many."
        )
    kept = _kept_resharded(clan, folder / shards.member_folder(holder), state, saved, numbers)
    reshard.load(
        dict(state.tensors),
        reshard.pieces_from(live),
        folder / shards.member_folder(holder),
        [(place, reshard.pieces_from(theirs["pieces"]), theirs["layout"]) for place, theirs in saved],
    )
    _recount(clan, numbers["scalars"])
    _load_numbers(clan, state, numbers)
    clan.backend.load_counters(numbers["counters"])
    # The boundary of an accumulation is where the counter says, and that counted another accumulation.
    clan.backend.accumulation = clan.backend.accumulation
    if clan.strategy.guards:
        clan.rollback_snapshot = kept or Snapshot(clan.state())
    return {**numbers, "streams": streams if at.dp < len(saved) else None}


def _kept_resharded(
    clan: Clan,
    folder: Path,
    state: MemberState,
    saved: Sequence[tuple[Coordinates, dict[str, Any]]],
    numbers: dict[str, Any],
) -> Snapshot | None:
    """The guard's copy on another number of data-parallel ranks; None where it was of the saved state itself.

    Args:
        clan: whose copy it is.
        folder: the member's, in the round's.
        state: the live one.
        saved: by rank that there was, its place and its numbers.
        numbers: of this rank's predecessor.
    """
    if ROLLBACK not in numbers:
        return None
    copies = {ROLLBACK + name: torch.empty_like(tensor, device="cpu") for name, tensor in state.tensors}
    reshard.load(
        copies,
        _prefixed(reshard.pieces_from(pieces_of(state))),
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
    _recount(clan, numbers[ROLLBACK]["scalars"])
    return copy_from(numbers, ROLLBACK, copies)


def _prefixed(pieces: reshard.Pieces) -> reshard.Pieces:
    return {ROLLBACK + name: own for name, own in pieces.items()}


def _recount(clan: Clan, scalars: dict[str, Any]) -> None:
    """Step counts by master: masters are cut otherwise now, and all have taken the same steps."""
    counts, size = scalars["optimizer"].get("counts"), len(clan.backend.masters())
    if counts:
        scalars["optimizer"]["counts"] = (counts * size)[:size]


def check_parameters(clan: Clan, folder: Path, sources: Sequence[int]) -> None:
    """Whether this rank's part of the model is the one that a round has, before anything of the run is touched.

    Args:
        clan: with its backend in place.
        folder: the round's.
        sources: by member, the member that it continues.

    Raises:
        CheckpointError: with the difference, unless ``checkpoint.allow`` names parameters.
    """
    content, at = manifest.read(folder), clan.world.at
    place = at if _is_laid_out(content, clan.world.topology) else reshard.saved_places(at, content["topology"])[0]
    numbers, _ = read_rank(folder, sources[clan.member], place.member_rank)
    difference = layout_difference(numbers["parameters"], parameter_layout(clan.backend.module))
    if difference is not None and PARAMETERS not in clan.config.checkpoint.allow:
        raise CheckpointError(
            f"the model is not the one that was saved: {difference}. Build the model that the run was started with."
        )


def _grown(clan: Clan, numbers: Mapping[str, Any]) -> MemberState:
    """The live state, with the optimizer state that the saved one has."""
    state = clan.state()
    names = [name for name, *_ in numbers["layout"]]
    if state.grow is not None:
        state.grow(names)
        state = clan.state()
    difference = layout_difference(numbers["layout"], state.manifest())
    if difference is not None:
        raise CheckpointError(
            f"member {clan.member}'s state does not fit the one that was saved: {difference}. "
            f"Use the optimizer, precision, ZeRO stage and number of ranks that the run was started with."
        )
    return state


def _load_numbers(clan: Clan, state: MemberState, numbers: Mapping[str, Any]) -> None:
    state.load_scalars(numbers["scalars"])
    for group, saved in zip(clan.backend.param_groups(), numbers["groups"], strict=True):
        group.update({key: merged(group.get(key), value) for key, value in saved.items()})
    state.refresh()
