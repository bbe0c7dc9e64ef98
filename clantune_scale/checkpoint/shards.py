"""Saves and loads a member's tensors with torch's distributed checkpoint: one call and one folder per member.

Each name carries the rank's place in the member. Torch writes a value that is no ``DTensor`` once per name, so shards
under one name would be lost. A state is restored to the last bit on ranks in the same layout.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from clantune_scale.distributed.topology import Coordinates
from clantune_scale.errors import CheckpointError

Tensors = Mapping[str, torch.Tensor]


def member_folder(member: int) -> str:
    """Where a member's tensors lie in a round's folder."""
    return f"member-{member:03d}"


def save(tensors: Tensors, folder: Path, at: Coordinates, group: Any) -> list[Path]:
    """Writes this rank's tensors; all ranks of the member call it.

    Args:
        tensors: by name, in host memory.
        folder: the member's.
        at: this rank's place.
        group: the member's ranks over gloo, a group that nothing else uses meanwhile.

    Returns:
        The files that this rank wrote.

    Raises:
        CheckpointError: on all ranks, with the first failed rank's reason.
    """
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
    with warnings.catch_warnings(), _as_error():
        # One process without a process group saves alone.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        named = {_key(name, at): tensor for name, tensor in tensors.items()}
        dcp.save(named, storage_writer=writer, process_group=group)
    own = sorted(folder.glob(f"__{at.member_rank}_*.distcp"))
    return [*own, folder / ".metadata"] if at.member_rank == 0 else own


def is_read_by(path: str, member: int, at: Coordinates) -> bool:
    """Whether a file of the manifest is one that a rank at ``at`` reads to take member ``member``'s tensors."""
    folder, _, name = path.partition("/")
    return folder == member_folder(member) and (name == ".metadata" or name.startswith(f"__{at.member_rank}_"))


def load(targets: Tensors, folder: Path, at: Coordinates) -> None:
    """Reads what :func:`save` wrote into ``targets``, in place. It is not a collective.

    Verify the digests first: ``.metadata`` is a pickle.
    """
    if not targets:
        return
    with warnings.catch_warnings(), _as_error():
        # The warning is for a call without communication, which is intended here.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        state = {_key(name, at): tensor.detach() for name, tensor in targets.items()}
        dcp.load(state, storage_reader=FileSystemReader(folder), no_dist=True)


@contextmanager
def _as_error() -> Iterator[None]:
    """Turns torch's exception for a failed checkpoint, a ``BaseException``, into a :class:`CheckpointError`."""
    try:
        yield
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"rank {rank} of the member: {type(reason).__name__}: {reason}") from error


def _key(name: str, at: Coordinates) -> str:
    return f"{name}@pp{at.pp}-dp{at.dp}-tp{at.tp}"
