"""Why a rank ended, told to the ranks that wait for it: otherwise they only see a closed connection."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed import Store

from clantune_scale.distributed.elastic.quorum import within
from clantune_scale.distributed.store import own_connection

# A rank that has ended by its own error has written why before its connections close.
_PATIENCE_S = 2.0
_POLL_S = 0.05


class LastWords:
    """One rank's view of the errors that ended ranks.

    Args:
        store: the clan's, on rank 0.
        rank, size: this rank and the number of ranks.
        name: maps a rank's number to its name in messages.
    """

    def __init__(self, store: Store, *, rank: int, size: int, name: Callable[[int], str]) -> None:
        self._store, self._rank, self._size, self._name = own_connection(store), rank, size, name

    def say(self, cause: str) -> None:
        """Tells the others, before this rank ends."""
        within(_PATIENCE_S, lambda: self._store.set(f"last_words/{self._rank}", cause))

    def of_others(self) -> str:
        """Which rank has ended and why, as the end of a sentence; empty if no rank has said anything."""
        found = within(2 * _PATIENCE_S, self._read)
        # Rank 0 serves the store. It is gone with what it wrote.
        return found if found is not None else f": {self._name(0)} has ended, and its own output says why"

    def _read(self) -> str | None:
        deadline = time.monotonic() + _PATIENCE_S
        try:
            while time.monotonic() < deadline:
                for rank in range(self._size):
                    if rank != self._rank and self._store.check([f"last_words/{rank}"]):
                        return f": {self._name(rank)} ended by {self._store.get(f'last_words/{rank}').decode()}"
                time.sleep(_POLL_S)
        except dist.DistError:
            return None
        return ""
