"""Reads a state that another number of data-parallel ranks saved.

Each saved rank and each live rank states which stretches of which logical vectors its tensors hold
(``MemberState.logical``). Elements in the overlap of two stretches are copied. Nothing is computed, so the values are
equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from clantune_scale.checkpoint import shards
from clantune_scale.distributed.topology import Coordinates, Topology
from clantune_scale.errors import CheckpointError
from clantune_scale.transfer.state import Piece

Pieces = Mapping[str, Sequence[Piece]]


def saved_places(at: Coordinates, saved: Mapping[str, int]) -> list[Coordinates]:
    """The saved member's ranks that held the same part of the model as a live rank does, in data-parallel order.

    Args:
        at: the live rank's place.
        saved: the saved topology's fields.
    """
    topology = Topology(**saved)
    return [
        place
        for place in map(topology.coordinates, range(topology.member_size))
        if (place.pp, place.tp) == (at.pp, at.tp)
    ]


def pieces_from(data: Mapping[str, Sequence[Sequence[Any]]]) -> dict[str, list[Piece]]:
    """Pieces from their JSON form."""
    return {name: [Piece(*values) for values in pieces] for name, pieces in data.items()}


def load(
    live: Mapping[str, torch.Tensor],
    pieces: Pieces,
    folder: Path,
    saved: Sequence[tuple[Coordinates, Pieces, Sequence[Sequence[Any]]]],
) -> None:
    """Fills live tensors from the saved ranks'.

    Args:
        live: by name, written in place.
        pieces: of the live tensors.
        folder: the member's.
        saved: by rank, its place, its tensors' pieces and its layout ([name, shape, dtype]).

    Raises:
        CheckpointError: if an element of the live state was not saved.
    """
    wanted = _by_key(pieces)
    filled = dict.fromkeys(wanted, 0)
    for at, theirs, layout in saved:
        needed = {name: own for name, own in theirs.items() if any(_overlaps(piece, wanted) for piece in own)}
        shapes = {name: (shape, getattr(torch, dtype.removeprefix("torch."))) for name, shape, dtype in layout}
        tensors = {name: torch.empty(shapes[name][0], dtype=shapes[name][1]) for name in needed}
        shards.load(tensors, folder, at)
        for name, own in needed.items():
            for source in own:
                for target, target_name in wanted.get(source.key, ()):
                    filled[source.key] += _copy(tensors[name], source, live[target_name], target)
    for key, targets in wanted.items():
        length = sum(piece.length for piece, _ in targets)
        # A vector that every saved rank holds whole was copied once per rank.
        if filled[key] < length or filled[key] % max(length, 1):
            raise CheckpointError(
                f"{filled[key]} elements of {key} were saved, and this rank has {length}. Launch with the number of "
                f"data-parallel ranks that the run was started with."
            )


def _by_key(pieces: Pieces) -> dict[str, list[tuple[Piece, str]]]:
    table: dict[str, list[tuple[Piece, str]]] = {}
    for name, own in pieces.items():
        for piece in own:
            table.setdefault(piece.key, []).append((piece, name))
    return table


def _overlaps(source: Piece, wanted: Mapping[str, list[tuple[Piece, str]]]) -> bool:
    return any(_overlap(source, target) is not None for target, _ in wanted.get(source.key, ()))


def _overlap(source: Piece, target: Piece) -> tuple[int, int] | None:
    low = max(source.start, target.start)
    high = min(source.start + source.length, target.start + target.length)
    return (low, high) if low < high else None


@torch.no_grad()
def _copy(tensor: torch.Tensor, source: Piece, live: torch.Tensor, target: Piece) -> int:
    """Copies the stretch that both hold; returns its length."""
    both = _overlap(source, target)
    if both is None:
        return 0
    low, high = both
    values = tensor.reshape(-1)[source.offset + low - source.start : source.offset + high - source.start]
    # A copy if the memory is in another order, channels last for example.
    flat = live.reshape(-1)
    flat[target.offset + low - target.start : target.offset + high - target.start] = values
    if not live.is_contiguous():
        live.copy_(flat.view_as(live))
    return high - low
