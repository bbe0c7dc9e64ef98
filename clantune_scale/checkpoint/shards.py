"""A member's tensors through torch's distributed checkpoint: one call per member, in a folder of its own.

Names carry the rank's place in the member: values that are no ``DTensor`` are written once per name, by whichever
rank comes first, and shards of one name would be lost. So written, a state goes back to ranks laid out as they
were, to the last bit.
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
        CheckpointError: with the first rank's reason, on all of them.
    """
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
    with _as_error():
        named = {_key(name, at): tensor for name, tensor in tensors.items()}
        dcp.save(named, storage_writer=writer, process_group=group)
    own = sorted(folder.glob(f"__{at.member_rank}_*.distcp"))
    return [*own, folder / ".metadata"] if at.member_rank == 0 else own


def is_read_by(path: str, member: int, at: Coordinates) -> bool:
    """Whether a file of the manifest is one that a rank at ``at`` reads to take member ``member``'s tensors."""
    folder, _, name = path.partition("/")
    return folder == member_folder(member) and (name == ".metadata" or name.startswith(f"__{at.member_rank}_"))


def load(targets: Tensors, folder: Path, at: Coordinates) -> None:
    """Reads what :func:`save` wrote into ``targets``, in place; this rank's alone, so that no one need call it too.

    Digests are verified before: ``.metadata`` is a pickle.
    """
    if not targets:
        return
    with warnings.catch_warnings(), _as_error():
        # It takes a call that talks to nobody for a mistake.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        state = {_key(name, at): tensor.detach() for name, tensor in targets.items()}
        dcp.load(state, storage_reader=FileSystemReader(folder), no_dist=True)


@contextmanager
def _as_error() -> Iterator[None]:
    """torch's exception for a failed checkpoint is no ``Exception``: like an interrupt, it passes every handler."""
    try:
        yield
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"rank {rank} of the member: {type(reason).__name__}: {reason}") from error


def _key(name: str, at: Coordinates) -> str:
    return f"{name}@pp{at.pp}-dp{at.dp}-tp{at.tp}"
