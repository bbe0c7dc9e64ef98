"""A member's training state on one rank: its tensors and scalars, their digests, and snapshots of them."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Piece:
    """A slice of a logical vector, and its position in a flat tensor of one rank.

    Attributes:
        key: the vector's name, which does not depend on the number of ranks that share it.
        start: index in the vector of the slice's first element.
        offset: index of that element in the tensor.
        length: number of elements.
    """

    key: str
    start: int
    offset: int
    length: int


@dataclass
class MemberState:
    """One rank's shard of everything that training continues from.

    Sixteen-bit weights are not part of it. ``refresh`` makes them from the masters.

    Attributes:
        tensors: live tensors: fp32 masters, optimizer moments, averaged weights, frozen parameters, buffers. All
            peers have them in the same order.
        scalars: values that JSON represents, in two parts. ``"optimizer"`` (step counts, loss scale) is restored by a
            rollback. ``"schedule"`` (the learning-rate scheduler) is taken over by a clone only.
        load_scalars: writes scalars of this form into the engine.
        refresh: updates the weights that the model computes with from the tensors (a member collective).
        grow: gets the tensor names of a saved state. It makes the optimizer state that those names ask for and this
            state lacks (most optimizers make theirs in the first step), and drops optimizer state that is not named.
            None if the backend has all of its state from the start.
        logical: returns, by tensor name, the slices of logical vectors that the tensor holds, for a resume on another
            number of data-parallel ranks. None if the backend does not know them.
    """

    tensors: list[tuple[str, torch.Tensor]]
    scalars: dict[str, Any]
    load_scalars: Callable[[Mapping[str, Any]], None] = field(repr=False)
    refresh: Callable[[], None] = field(repr=False)
    grow: Callable[[Collection[str]], None] | None = field(default=None, repr=False)
    logical: Callable[[], dict[str, list[Piece]] | None] | None = field(default=None, repr=False)

    @property
    def num_bytes(self) -> int:
        """Size of this rank's tensors, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.tensors)

    def manifest(self) -> list[list[Any]]:
        """[name, shape, dtype] of every tensor, in order. Donor and recipient must have the same manifest."""
        return [[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in self.tensors]

    def pieces(self, max_bytes: int) -> Iterator[list[torch.Tensor]]:
        """The tensors' bytes in buckets: lists of uint8 views of live memory, at most ``max_bytes`` each.

        Args:
            max_bytes: of a bucket.

        Raises:
            ValueError: if a tensor is not contiguous. Its bytes cannot be viewed in place.
        """
        bucket: list[torch.Tensor] = []
        room = max_bytes
        for name, tensor in self.tensors:
            if not tensor.is_contiguous():
                raise ValueError(f"{name} of shape {list(tensor.shape)} has strides {tensor.stride()}: not contiguous")
            flat = (
                tensor.detach().view(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)
            )
            while flat.numel():
                head, flat = flat[:room], flat[room:]
                if bucket and bucket[0].device != head.device:
                    yield bucket
                    bucket, room = [], max_bytes
                bucket.append(head)
                room -= head.numel()
                if room == 0:
                    yield bucket
                    bucket, room = [], max_bytes
        if bucket:
            yield bucket


_DIGEST_WORDS = 1 << 17


def bytes_digest(buffer: torch.Tensor) -> list[int]:
    """Two 64-bit sums over the words of a uint8 buffer, computed on its device without a host copy.

    The plain sum changes with any single flipped bit. The sum with weights 1, 3, 5, ... changes when words swap.
    The digest detects faults and does not protect against an adversary.
    """
    if buffer.storage_offset() % 8:
        # torch cannot view bytes as int64 if they start inside a word.
        buffer = buffer.clone()
    words = buffer[: buffer.numel() // 8 * 8].view(torch.int64)
    rest = buffer.new_zeros(8)
    rest[: buffer.numel() % 8] = buffer[words.numel() * 8 :]
    weights = torch.arange(min(words.numel(), _DIGEST_WORDS), device=words.device).mul_(2).add_(1)
    plain_sum, weighted_sum = words.new_zeros(()), words.new_zeros(())
    # In parts: the weights and products of a whole bucket would need twice its memory.
    for part, first in enumerate(range(0, words.numel(), _DIGEST_WORDS)):
        chunk = words[first : first + _DIGEST_WORDS]
        total = chunk.sum()
        plain_sum += total
        weighted_sum += (chunk * weights[: chunk.numel()]).sum() + total * (2 * part * _DIGEST_WORDS)
    last = rest.view(torch.int64)[0]
    return [int(plain_sum + last), int(weighted_sum + last * (2 * words.numel() + 1))]


def state_digest(state: MemberState, bucket_bytes: int = 1 << 25) -> str:
    """Hex digest of the manifest and of all tensors' bytes. Equal states have equal digests."""
    digest = hashlib.blake2b(repr(state.manifest()).encode(), digest_size=16)
    for pieces in state.pieces(bucket_bytes):
        digest.update(repr(bytes_digest(torch.cat(pieces))).encode())
    return digest.hexdigest()


class Snapshot:
    """A copy of a rank's tensors and optimizer scalars in host memory, to restore later.

    Restoring it leaves the engine's step counts, the schedule and the data order as they are: the steps were taken, and
    only their effect on the weights is undone. Optimizer state that did not exist when the snapshot was taken (most
    optimizers make theirs in the first step) is dropped, so that the optimizer makes it anew; if the engine cannot drop
    it, it is set to zero.

    Args:
        state: the live one.
        former: a snapshot that is given up. Its memory is used again, tensor by tensor, if shapes and types are the
            same and no one reads from it (:meth:`lend`); there is never more than one copy of a tensor then.
    """

    def __init__(self, state: MemberState, former: Snapshot | None = None) -> None:
        spare = {} if former is None else former._give_up()
        self.tensors = [(name, _to_host(tensor, spare.pop(name, None))) for name, tensor in state.tensors]
        for device in {tensor.device for _, tensor in state.tensors if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        self.scalars = {"optimizer": state.scalars["optimizer"]}
        self._reader: weakref.ref[Any] | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any]) -> Snapshot:
        """A snapshot from saved parts.

        Args:
            tensors: by name, in host memory.
            scalars: as in ``MemberState``, with ``"optimizer"``.
        """
        snapshot = cls.__new__(cls)
        snapshot.tensors, snapshot.scalars = list(tensors.items()), dict(scalars)
        snapshot._reader = None
        return snapshot

    def lend(self, reader: Any) -> None:
        """Keeps the tensors as they are as long as ``reader`` exists: another thread reads from them."""
        self._reader = weakref.ref(reader)

    def _give_up(self) -> dict[str, torch.Tensor]:
        """The memory, by name, to be written to. Nothing is left in this snapshot."""
        is_read = self._reader is not None and self._reader() is not None
        spare, self.tensors = {} if is_read else dict(self.tensors), []
        return spare

    def layout(self) -> list[list[Any]]:
        """[name, shape, dtype] of every tensor, in the form of ``MemberState.manifest``."""
        return [[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in self.tensors]

    @torch.no_grad()
    def restore(self, state: Callable[[], MemberState]) -> None:
        """Writes the snapshot into the live state (a member collective).

        Args:
            state: gives the live state.

        Raises:
            ValueError: if the state does not have the tensors that it had when the snapshot was taken.
        """
        saved, now = dict(self.tensors), state()
        if now.grow is not None:
            # Some optimizers keep nothing but numbers.
            counts = enumerate(self.scalars["optimizer"].get("counts", ()))
            now.grow([*saved, *(f"optimizer.{index}." for index, own in counts if own)])
            now = state()
        live = dict(now.tensors)
        unknown = [name for name in live if name not in saved and not name.startswith("optimizer.")]
        lost = [name for name in saved if name not in live]
        if unknown or lost:
            raise ValueError(f"the snapshot does not fit the state: it lacks {unknown[:3]} and has {lost[:3]} too many")
        for name, tensor in live.items():
            if name in saved:
                tensor.copy_(saved[name])
            else:
                tensor.zero_()
        now.load_scalars(self.scalars)
        now.refresh()


@torch.no_grad()
def _to_host(tensor: torch.Tensor, spare: torch.Tensor | None) -> torch.Tensor:
    """A copy in host memory, in ``spare`` if it fits; pinned for a CUDA tensor, and then perhaps still on its way."""
    fits = spare is not None and spare.shape == tensor.shape and spare.dtype == tensor.dtype
    if not tensor.is_cuda:
        return spare.copy_(tensor) if fits and spare is not None else tensor.detach().to("cpu", copy=True)
    if spare is None or not fits or not spare.is_pinned():
        spare = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return spare.copy_(tensor.detach(), non_blocking=True)


@torch.no_grad()
def grow_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor], wanted: Collection[int]
) -> None:
    """Makes optimizer state for exactly the wanted parameters. Its values are to be loaded afterwards.

    Only the optimizer knows what it keeps and in which types. So its own step makes the state, on zero gradients and at
    learning rate zero. Load the parameters afterwards as well.

    Args:
        optimizer: torch's, or one with the same interface.
        parameters: the keys of its state.
        wanted: indices into ``parameters``. The state of all others is dropped.
    """
    keys = list(parameters)
    lacking = [keys[index] for index in wanted if not optimizer.state.get(keys[index])]
    for index, key in enumerate(keys):
        if index not in wanted:
            optimizer.state.pop(key, None)
    if not lacking:
        return
    gradients = [key.grad for key in keys]
    learning_rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
    for key in keys:
        key.grad = None
    takes_dense = not isinstance(optimizer, torch.optim.SparseAdam)
    for key in lacking:
        key.grad = torch.zeros_like(key) if takes_dense else torch.sparse_coo_tensor(size=key.shape, dtype=key.dtype)
    for group in optimizer.param_groups:
        if "lr" in group:
            group["lr"] = torch.zeros_like(group["lr"]) if torch.is_tensor(group["lr"]) else 0.0
    with _without_hooks(optimizer):
        # The class's method: an engine, a scheduler or the clan may have replaced the instance's.
        type(optimizer).step(optimizer)
    for key, gradient in zip(keys, gradients, strict=True):
        key.grad = gradient
    for group, learning_rate in zip([g for g in optimizer.param_groups if "lr" in g], learning_rates, strict=True):
        group["lr"] = learning_rate


@contextmanager
def _without_hooks(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Removes the optimizer's step hooks inside: the clan's and the user's hooks expect a training step."""
    names = [name for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks") if hasattr(optimizer, name)]
    held = {name: getattr(optimizer, name) for name in names}
    for name, hooks in held.items():
        setattr(optimizer, name, type(hooks)())
    try:
        yield
    finally:
        for name, hooks in held.items():
            setattr(optimizer, name, hooks)


# Marks a value that JSON cannot represent (a function, a dict with other keys than strings). The live value stays.
_ABSENT = object()


def plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``state`` that JSON represents, with one-element tensors as numbers. All else is left out."""
    return {key: value for key, value in _strip(state).items() if value is not _ABSENT}


def merged(live: Any, saved: Any) -> Any:
    """``saved`` (from :func:`plain`) with the types of ``live``. Values that it lacks are taken from ``live``."""
    if isinstance(live, torch.Tensor) and not isinstance(saved, list | dict):
        return torch.full_like(live, saved)
    if isinstance(saved, dict) and isinstance(live, Mapping):
        return {**live, **{key: merged(live.get(key), value) for key, value in saved.items()}}
    if isinstance(saved, list):
        pairs = list(live) if isinstance(live, list | tuple) and len(live) == len(saved) else [None] * len(saved)
        values = [merged(old, new) for old, new in zip(pairs, saved, strict=True)]
        return tuple(values) if isinstance(live, tuple) else values
    return saved


def _strip(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else _ABSENT
    if isinstance(value, list | tuple):
        items = [_strip(item) for item in value]
        return _ABSENT if any(item is _ABSENT for item in items) else items
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: item for key, item in ((k, _strip(v)) for k, v in value.items()) if item is not _ABSENT}
    return _ABSENT
