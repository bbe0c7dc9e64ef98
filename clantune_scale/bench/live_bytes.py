"""Bytes of live tensors on the CPU, counted operator by operator: on the device, and beside it in host memory."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

Place = Literal["device", "host"]


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make, from their first tensor to the end of their last.

    On the CPU both places are one memory. So what a GPU's run would put into host memory is told by who makes it:
    :meth:`on_host`.

    Attributes:
        now: bytes, by place.
        peak: the most at once since the last :meth:`restart`, by place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now: Counter[Place] = Counter()
        self.peak: Counter[Place] = Counter()
        self._found: dict[int, tuple[Place, int]] = {}
        self._place: Place = "device"

    def restart(self) -> None:
        """Forgets the peaks so far."""
        self.peak = Counter(self.now)

    @contextmanager
    def resizing(self) -> Iterator[None]:
        """Inside, storages that are resized count anew: FSDP2 frees gathered weights so."""
        resize = torch.UntypedStorage.resize_

        def resize_and_count(storage: Any, size: int) -> Any:
            resize(storage, size)
            if storage._cdata in self._found:
                place, _ = self._forget(storage._cdata)
                self._add(storage._cdata, place, size)

        torch.UntypedStorage.resize_ = resize_and_count  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]

    def on_host(self, owner: Any, name: str) -> Callable[[], None]:
        """Counts as in host memory what a function makes; returns what undoes that.

        Args:
            owner: a class.
            name: of its method.
        """
        method = getattr(owner, name)

        @wraps(method)
        def method_on_host(*args: Any, **kwargs: Any) -> Any:
            before, self._place = self._place, "host"
            try:
                return method(*args, **kwargs)
            finally:
                self._place = before

        setattr(owner, name, method_on_host)
        return lambda: setattr(owner, name, method)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, with the local tensors
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._see, out)
        return out

    def _see(self, tensor: torch.Tensor) -> None:
        if isinstance(tensor, DTensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._found:
            self._add(key, self._place, storage.nbytes())
            weakref.finalize(storage, self._forget, key).atexit = False

    def _add(self, key: int, place: Place, size: int) -> None:
        self._found[key] = place, size
        self.now[place] += size
        self.peak[place] = max(self.peak[place], self.now[place])

    def _forget(self, key: int) -> tuple[Place, int]:
        place, size = self._found.pop(key)
        self.now[place] -= size
        return place, size
