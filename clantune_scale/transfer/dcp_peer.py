"""Torch's distributed checkpoint (DCP) as a transport from peer to peer, without a file.

A storage writer on the donor sends to a storage reader on the recipient. The recipient's DCP planner compares names,
sizes and offsets before it requests a byte, and provides the live tensors that the bytes are received into. The
metadata, which DCP pickles, travels as JSON.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch.distributed.checkpoint import StorageReader, StorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from clantune_scale.transfer.dcp_plans import WatchedLoadPlanner, load_one_process, named, reason, save_one_process
from clantune_scale.transfer.route import Route
from clantune_scale.transfer.state import MemberState
from clantune_scale.transfer.transport import OnReceived

_TAG = 72
# [name, dtype, size of the whole tensor, offsets of this piece, sizes of this piece]
Item = tuple[str, str, list[int], list[int], list[int]]


class Neighbours:
    """Messages to the previous and the next member of a chain.

    Args:
        route: the chain.
        bucket_bytes: most bytes in one message.
    """

    def __init__(self, route: Route, bucket_bytes: int) -> None:
        self.before, self.after = route.before, route.after
        self._route, self._bucket_bytes = route, bucket_bytes

    def send_json(self, member: int, value: Any) -> None:
        """Sends a value that JSON represents."""
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        group = self._route.group_for("cpu")
        group.send([torch.tensor([payload.numel()])], member, _TAG).wait()
        group.send([payload], member, _TAG).wait()

    def receive_json(self, member: int) -> Any:
        """Receives a value from :meth:`send_json`."""
        group = self._route.group_for("cpu")
        size = torch.zeros(1, dtype=torch.int64)
        group.recv([size], member, _TAG).wait()
        payload = torch.empty(int(size), dtype=torch.uint8)
        group.recv([payload], member, _TAG).wait()
        return json.loads(payload.numpy().tobytes())

    def stream(self, tensor: torch.Tensor) -> None:
        """Receives a contiguous tensor from the previous member and forwards it to the next, as far as they exist."""
        group = self._route.group_for(tensor.device.type)
        sending = []
        for part in tensor.view(-1).view(torch.uint8).split(self._bucket_bytes):
            if self.before is not None:
                group.recv([part], self.before, _TAG).wait()
            if self.after is not None:
                sending.append(group.send([part], self.after, _TAG))
        for message in sending:
            message.wait()


class _WithoutAddress:
    """The methods of a storage that has no address and does not change plans."""

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan

    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class PeerWriter(_WithoutAddress, StorageWriter):
    """Sends what the donor saves to the next member of the chain, in the order of the plan.

    Args:
        neighbours: the next member of the chain.
    """

    def __init__(self, neighbours: Neighbours) -> None:
        self._neighbours = neighbours
        self._parts: list[tuple[Item, torch.Tensor]] = []

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def storage_meta(self) -> StorageMeta | None:
        return None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        for item in plan.items:
            data, tensor = item.tensor_data, planner.resolve_data(item)
            assert data is not None and isinstance(tensor, torch.Tensor), "DCP does not move the scalars"
            dtype = str(tensor.dtype).removeprefix("torch.")
            entry = (item.index.fqn, dtype, list(data.size), list(data.chunk.offsets), list(data.chunk.sizes))
            self._parts.append((entry, tensor.detach()))
            results.append(WriteResult(index=item.index, size_in_bytes=tensor.nbytes, storage_data=None))
        return _done(results)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        assert self._neighbours.after is not None, "a donor has a recipient"
        self._neighbours.send_json(self._neighbours.after, [entry for entry, _ in self._parts])
        complaint = self._neighbours.receive_json(self._neighbours.after)
        self._neighbours.send_json(self._neighbours.after, complaint)
        if complaint is None:
            for _, tensor in self._parts:
                self._neighbours.stream(tensor)


class PeerReader(_WithoutAddress, StorageReader):
    """Receives what the recipient loads from the previous member of the chain, and forwards it to the next.

    Args:
        neighbours: the previous and the next member of the chain.
    """

    def __init__(self, neighbours: Neighbours) -> None:
        self._neighbours = neighbours
        self._items: list[Item] = []
        self.has_agreed = False

    def read_metadata(self, *args: Any) -> Metadata:
        assert self._neighbours.before is not None, "a recipient has a donor"
        self._items = self._neighbours.receive_json(self._neighbours.before)
        if self._neighbours.after is not None:
            self._neighbours.send_json(self._neighbours.after, self._items)
        return _metadata(self._items)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted = {(item.storage_index.fqn, tuple(item.storage_index.offset or ())): item for item in plan.items}
        targets = []
        for name, dtype, _, offsets, sizes in self._items:
            item = wanted.pop((name, tuple(offsets)), None)
            target = None if item is None else planner.resolve_tensor(item).detach()
            if target is None or item is None or item.type is not LoadItemType.TENSOR or list(target.shape) != sizes:
                raise ValueError(f"{name}{offsets} of {sizes} arrives, and this rank has no tensor of this size for it")
            if str(target.dtype) != f"torch.{dtype}":
                raise ValueError(f"{name} arrives as {dtype} and is {target.dtype} on this rank")
            targets.append((item, target))
        if wanted:
            raise ValueError(f"this rank expects {sorted(wanted)[0]}, which does not arrive")
        complaint = self.agree(None)
        if complaint is not None:
            raise ValueError(complaint)
        for item, target in targets:
            self._neighbours.stream(target)
            planner.commit_tensor(item, target)
        return _done(None)

    def agree(self, complaint: str | None) -> str | None:
        """Agrees with the chain, before a byte is sent, on whether all its members can receive.

        Answers travel up the chain to the donor, and the donor's verdict travels down.

        Args:
            complaint: why this rank cannot receive; None if it can.

        Returns:
            The first complaint in the chain; None if the bytes follow.
        """
        self.has_agreed = True
        before, after = self._neighbours.before, self._neighbours.after
        assert before is not None, "a recipient has a donor"
        behind = self._neighbours.receive_json(after) if after is not None else None
        self._neighbours.send_json(before, complaint or behind)
        verdict = self._neighbours.receive_json(before)
        if after is not None:
            self._neighbours.send_json(after, verdict)
        return verdict


class DcpPeerTransport:
    """DCP's writer and reader between peers.

    Args:
        bucket_bytes: most bytes in one message.
    """

    def __init__(self, *, bucket_bytes: int) -> None:
        self._bucket_bytes = bucket_bytes
        self.on_received: OnReceived | None = None

    def move(self, state: MemberState, route: Route) -> str | None:
        neighbours = Neighbours(route, self._bucket_bytes)
        tensors = named(state, route.place)
        if neighbours.before is None:
            if neighbours.after is not None:
                save_one_process(tensors, PeerWriter(neighbours))
            return None
        reader = PeerReader(neighbours)
        try:
            load_one_process(tensors, reader, WatchedLoadPlanner(self.on_received))
        except CheckpointException as error:
            complaint = reason(error)
            return complaint if reader.has_agreed else reader.agree(complaint)
        return None


def _metadata(items: list[Item]) -> Metadata:
    tensors: dict[str, TensorStorageMetadata] = {}
    for name, dtype, size, offsets, sizes in items:
        properties = TensorProperties(dtype=getattr(torch, dtype))
        whole = tensors.setdefault(name, TensorStorageMetadata(properties, torch.Size(size), []))
        whole.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
    places = {MetadataIndex(name, torch.Size(offsets)): None for name, _, _, offsets, _ in items}
    return Metadata(state_dict_metadata=dict(tensors), storage_data=places)


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future
