"""What the DCP transport asks of torch: the names of a shard, a planner that can be watched, saving and loading."""

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

from clantune_scale.transfer.state import MemberState
from clantune_scale.transfer.transport import OnReceived

Named = dict[str, torch.Tensor]


def named(state: MemberState, place: str) -> Named:
    """The live tensors under names that are equal on donor and recipient, and on no other pair of ranks.

    Args:
        state: this rank's.
        place: its coordinate in the member.

    Raises:
        ValueError: if two tensors have one name, of which DCP would keep the last.
    """
    # DCP writes empty tensors and plans no reading of them.
    full = [(name, tensor) for name, tensor in state.tensors if tensor.numel()]
    tensors = {f"{place}/{name}": tensor.detach() for name, tensor in full}
    if len(tensors) != len(full):
        raise ValueError(f"{len(full)} tensors have {len(tensors)} different names")
    return tensors


class WatchedLoadPlanner(DefaultLoadPlanner):
    """DCP's own planner: compares names, sizes and offsets, and hands out the live tensors to be filled.

    Args:
        on_received: shown each tensor's bytes when they are in place.
    """

    def __init__(self, on_received: OnReceived | None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._on_received = on_received
        self._count = 0

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        if self._on_received is not None and tensor.numel():
            self._on_received(self._count, tensor.view(-1).view(torch.uint8))
            self._count += 1
        super().commit_tensor(read_item, tensor)


def save_alone(tensors: Mapping[str, torch.Tensor], writer: StorageWriter) -> None:
    """``dcp.save`` of this process alone."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with _knowing_that_it_is_alone():
        save(dict(tensors), storage_writer=writer, planner=planner, no_dist=True)


def load_alone(tensors: Named, reader: StorageReader, planner: WatchedLoadPlanner) -> None:
    """``dcp.load`` into live tensors, of this process alone."""
    with _knowing_that_it_is_alone():
        load(tensors, storage_reader=reader, planner=planner, no_dist=True)


def reason(error: BaseException) -> str:
    """The cause in one line; DCP collects what each rank raised, and here there is one rank."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}"


@contextmanager
def _knowing_that_it_is_alone() -> Iterator[None]:
    # DCP warns that it takes the process to be alone, which is what it was told.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield
