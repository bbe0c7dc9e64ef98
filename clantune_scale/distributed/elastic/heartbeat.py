"""Heartbeats: each rank counts up a key in the clan's store, and checks that the next rank counts up its own.

A collective notices a dead peer only if its transport does: gloo at once, NCCL perhaps never. The heartbeat notices it
whatever training waits for, with three small requests per rank and beat. The first rank that sees a failure writes it
into the store, and all others leave within one beat.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from torch.distributed import DistError, Store

_FAILED = "failed"


class Heartbeat:
    """Two threads: one sends requests to the store, and the other checks that the store answers.

    Silence is counted in beats of this process and not by the clock. A process that was suspended itself has not
    observed the others during that time.

    Args:
        store: a connection of its own. A call on a shared connection would block behind a waiting thread.
        rank, size: this rank and the number of ranks. A rank watches the next one, and the last rank watches the first.
        name: maps a rank's number to its name in messages.
        silence_s: seconds without a heartbeat after which a rank, or the store, counts as gone.
        on_failure: called once, on one of the threads, with what happened.
    """

    def __init__(
        self,
        store: Store,
        *,
        rank: int,
        size: int,
        name: Callable[[int], str],
        silence_s: float,
        on_failure: Callable[[str], None],
    ) -> None:
        self._store, self._rank, self._next, self._name = store, rank, (rank + 1) % size, name
        self._silence_s, self._on_failure = silence_s, on_failure
        self._beat_s = max(0.1, min(2.0, silence_s / 5))
        self._unanswered = 0
        self._is_over = threading.Event()
        self._once = threading.Lock()
        for work in (self._beat, self._watch):
            threading.Thread(target=work, name=f"clantune{work.__name__}", daemon=True).start()

    def stop(self) -> None:
        """Stops both threads. ``on_failure`` is not called after this."""
        self._is_over.set()

    def tell(self, reason: str) -> str:
        """Writes a failure into the store for the other ranks.

        Returns:
            The first failure that was written, which can be another rank's.
        """
        return self._store.compare_set(_FAILED, "", reason).decode()

    def _beat(self) -> None:
        last, same = -1, 0
        while not self._is_over.is_set():
            try:
                self._store.add(f"heartbeat/{self._rank}", 1)
                seen = self._store.add(f"heartbeat/{self._next}", 0)
                failure = self._store.get(_FAILED).decode() if self._store.check([_FAILED]) else None
            except DistError as error:
                self._fail(f"the clan's store is gone ({str(error).splitlines()[0]})")
                return
            self._unanswered = 0
            # Adding 0 reads the counter. It stays the same between two beats if the next rank is silent.
            last, same = seen, same + 1 if seen == last else 0
            if failure is None and same * self._beat_s > self._silence_s:
                failure = self.tell(f"{self._name(self._next)} gave no sign of life for {self._silence_s:g} s")
            if failure is not None:
                self._fail(failure)
                return
            self._is_over.wait(self._beat_s)

    def _watch(self) -> None:
        # A call on a store whose host is frozen does not return, so another thread has to notice it.
        while not self._is_over.wait(self._beat_s):
            self._unanswered += 1
            if self._unanswered * self._beat_s > self._silence_s:
                self._fail(f"the clan's store gave no answer for {self._silence_s:g} s")
                return

    def _fail(self, reason: str) -> None:
        # The lock is never released: only the first of the two threads reports.
        if self._once.acquire(blocking=False) and not self._is_over.is_set():
            self._on_failure(reason)
