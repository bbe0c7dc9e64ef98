"""What the DCP transport asks of torch: the names of a shard, a planner that reports what arrives, save and load."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from clantune_scale.transfer.memory import memory_of
from clantune_scale.transfer.state import MemberState
from clantune_scale.transfer.transport import OnReceived

Named = dict[str, torch.Tensor]


def named(state: MemberState, place: str) -> Named:
    """The live tensors by names that donor and recipient share, and that no other pair of ranks uses.

    Args:
        state: this rank's.
        place: this rank's coordinates in its member.

    Raises:
        ValueError: if two tensors have the same name. DCP would keep the last one.
    """
    # DCP saves empty tensors but does not load them.
    full = [(name, tensor) for name, tensor in state.tensors if tensor.numel()]
    tensors = {f"{place}/{name}": tensor.detach() for name, tensor in full}
    if len(tensors) != len(full):
        raise ValueError(f"{len(full)} tensors have {len(tensors)} different names")
    return tensors


class WatchedLoadPlanner(DefaultLoadPlanner):
    """DCP's own planner, which compares names, sizes and offsets, and provides the live tensors to fill.

    Args:
        on_received: is called with each tensor's bytes when they are in place; None for nothing.
    """

    def __init__(self, on_received: OnReceived | None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._on_received = on_received
        self._count = 0

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        if self._on_received is not None and tensor.numel():
            for memory in memory_of(tensor):
                self._on_received(self._count, memory.view(torch.uint8))
                self._count += 1
        super().commit_tensor(read_item, tensor)


def save_one_process(tensors: Mapping[str, torch.Tensor], writer: StorageWriter) -> None:
    """``dcp.save`` of this process without the others."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _without_warning():
        save(dict(tensors), storage_writer=writer, planner=planner, no_dist=True)


def load_one_process(tensors: Named, reader: StorageReader, planner: WatchedLoadPlanner) -> None:
    """``dcp.load`` of this process without the others, into live tensors."""
    with _without_warning():
        load(tensors, storage_reader=reader, planner=planner, no_dist=True)


def reason(error: BaseException) -> str:
    """The cause of an error in one line. DCP collects the errors of all ranks, and here there is one rank."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}"


@contextmanager
def _without_warning() -> Iterator[None]:
    # DCP warns that it assumes a single process. no_dist=True asks for that.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield
