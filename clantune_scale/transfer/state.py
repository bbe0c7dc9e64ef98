"""What a member's training state is on one rank, and a copy of it kept aside."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, sharing its memory; the tensor itself where it is whole."""
    with torch.no_grad():
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return part.detach()


@dataclass(frozen=True)
class Piece:
    """A stretch of a logical vector, as it lies in a flat tensor of one rank.

    Attributes:
        key: names the vector; the same however many ranks share it.
        start: first element of the vector that is here.
        offset: where it lies in the tensor.
        length: elements.
    """

    key: str
    start: int
    offset: int
    length: int


@dataclass
class MemberState:
    """One rank's shard of everything that training continues from.

    Sixteen-bit weights are not in it: they follow from the masters by ``refresh``.

    Attributes:
        tensors: live tensors in an order that is the same on every rank of a column: fp32 masters,
            optimizer moments, averaged weights, frozen parameters, buffers.
        scalars: what JSON holds, split into ``"optimizer"`` (step counts, loss scale), which goes back
            with a rollback, and ``"schedule"`` (the learning-rate scheduler), which only a clone takes.
        load_scalars: puts such a mapping into the engine.
        refresh: brings the weights that the model computes with up to date with the tensors; a
            collective of the member.
        grow: makes optimizer state that a saved state has, by the names of its tensors, and this one lacks
            because the optimizer has not stepped yet (most make theirs in the first step); state that is not
            among the names goes. None where the backend's states are there from the start.
        logical: by tensor name, the stretches of vectors that it holds which do not depend on the number of
            data-parallel ranks, for a resume on another; None where the backend cannot say.
    """

    tensors: list[tuple[str, torch.Tensor]]
    scalars: dict[str, Any]
    load_scalars: Callable[[Mapping[str, Any]], None] = field(repr=False)
    refresh: Callable[[], None] = field(repr=False)
    grow: Callable[[Collection[str]], None] | None = field(default=None, repr=False)
    logical: Callable[[], dict[str, list[Piece]] | None] | None = field(default=None, repr=False)

    @property
    def num_bytes(self) -> int:
        """Of this rank's tensors."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.tensors)

    def manifest(self) -> list[list[Any]]:
        """[name, shape, dtype] of every tensor, in order: what two ranks must have in common."""
        return [[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in self.tensors]

    def pieces(self, max_bytes: int) -> Iterator[list[torch.Tensor]]:
        """The tensors' bytes in buckets: lists of uint8 views of live memory, at most ``max_bytes`` each.

        Raises:
            ValueError: if a tensor is not contiguous, so that its bytes cannot be viewed in place.
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
    """Two 64-bit sums over the words of a uint8 buffer, computed where it lies; no host copy of the data.

    The plain sum changes with any single flipped bit; the sum with weights 1, 3, 5, ... changes when words
    change places. It guards against faults, not against an adversary.
    """
    if buffer.storage_offset() % 8:
        # A view that begins inside a word cannot be read by words.
        buffer = buffer.clone()
    words = buffer[: buffer.numel() // 8 * 8].view(torch.int64)
    rest = buffer.new_zeros(8)
    rest[: buffer.numel() % 8] = buffer[words.numel() * 8 :]
    weights = torch.arange(min(words.numel(), _DIGEST_WORDS), device=words.device).mul_(2).add_(1)
    plain, weighted = words.new_zeros(()), words.new_zeros(())
    # In parts: weights and products for a whole bucket would take twice its room.
    for part, first in enumerate(range(0, words.numel(), _DIGEST_WORDS)):
        chunk = words[first : first + _DIGEST_WORDS]
        total = chunk.sum()
        plain += total
        weighted += (chunk * weights[: chunk.numel()]).sum() + total * (2 * part * _DIGEST_WORDS)
    last = rest.view(torch.int64)[0]
    return [int(plain + last), int(weighted + last * (2 * words.numel() + 1))]


def state_digest(state: MemberState, bucket_bytes: int = 1 << 25) -> str:
    """Hex digest of all tensors' bytes and the manifest: equal states give equal digests."""
    digest = hashlib.blake2b(repr(state.manifest()).encode(), digest_size=16)
    for pieces in state.pieces(bucket_bytes):
        digest.update(repr(bytes_digest(torch.cat(pieces))).encode())
    return digest.hexdigest()


class Snapshot:
    """A copy in host memory of a rank's tensors and optimizer scalars, to go back to.

    Step counts of the engine, the schedule and the data order stay where they are when it is restored:
    time is spent, only what it did to the weights is undone. Optimizer state that did not exist yet when it
    was taken (most optimizers make theirs in the first step) goes back to zero, which is how it begins.
    """

    def __init__(self, state: MemberState) -> None:
        self.tensors = [(name, tensor.detach().to("cpu", copy=True)) for name, tensor in state.tensors]
        self.scalars = {"optimizer": state.scalars["optimizer"]}

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any]) -> Snapshot:
        """A copy that was written down before: its tensors in host memory, by name, and its scalars."""
        snapshot = cls.__new__(cls)
        snapshot.tensors, snapshot.scalars = list(tensors.items()), dict(scalars)
        return snapshot

    def layout(self) -> list[list[Any]]:
        """[name, shape, dtype] of every tensor, as ``MemberState.manifest`` has them."""
        return [[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in self.tensors]

    @torch.no_grad()
    def restore(self, state: MemberState) -> None:
        """Puts the copy into live ``state``; a collective of the member.

        Raises:
            ValueError: if the state has other tensors than it had when the copy was taken.
        """
        kept = dict(self.tensors)
        live = dict(state.tensors)
        unknown = [name for name in live if name not in kept and not name.startswith("optimizer.")]
        lost = [name for name in kept if name not in live]
        if unknown or lost:
            raise ValueError(f"the snapshot does not fit the state: it lacks {unknown[:3]} and has {lost[:3]} too many")
        for name, tensor in live.items():
            if name in kept:
                tensor.copy_(kept[name])
            else:
                tensor.zero_()
        state.load_scalars(self.scalars)
        state.refresh()


@torch.no_grad()
def grow_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Sequence[torch.Tensor], wanted: Collection[int]
) -> None:
    """Gives exactly the parameters with these places their optimizer state; its values are to be loaded.

    It is made by the optimizer's own step on zero gradients at rate zero, because what an optimizer keeps, and
    in which types, is its own affair. Parameters are to be loaded afterwards too.

    Args:
        optimizer: torch's, or one made like it.
        parameters: the keys of its state.
        wanted: indices into ``parameters``; state of all others goes.
    """
    keys = list(parameters)
    lacking = [keys[place] for place in wanted if not optimizer.state.get(keys[place])]
    for place, key in enumerate(keys):
        if place not in wanted:
            optimizer.state.pop(key, None)
    if not lacking:
        return
    gradients = [key.grad for key in keys]
    rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
    for key in keys:
        key.grad = None
    for key in lacking:
        key.grad = torch.zeros_like(key)
    for group in optimizer.param_groups:
        if "lr" in group:
            group["lr"] = torch.zeros_like(group["lr"]) if torch.is_tensor(group["lr"]) else 0.0
    with _without_hooks(optimizer):
        # The class's own: the instance's may be replaced by an engine, a scheduler or the clan.
        type(optimizer).step(optimizer)
    for key, gradient in zip(keys, gradients, strict=True):
        key.grad = gradient
    for group, rate in zip([g for g in optimizer.param_groups if "lr" in g], rates, strict=True):
        group["lr"] = rate


@contextmanager
def _without_hooks(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the hooks that torch calls around a step are not: this one is none of the training's."""
    names = [name for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks") if hasattr(optimizer, name)]
    held = {name: getattr(optimizer, name) for name in names}
    for name, hooks in held.items():
        setattr(optimizer, name, type(hooks)())
    try:
        yield
    finally:
        for name, hooks in held.items():
            setattr(optimizer, name, hooks)


# Stands for what JSON cannot hold (a function, a dict with keys that are no text): the live value stays.
_ABSENT = object()


def plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON holds of ``state``, one-element tensors as numbers; all else is left out."""
    return {key: value for key, value in _strip(state).items() if value is not _ABSENT}


def merged(live: Any, saved: Any) -> Any:
    """``saved`` (from :func:`plain`) with the types of ``live``, and what it lacks taken from there."""
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
