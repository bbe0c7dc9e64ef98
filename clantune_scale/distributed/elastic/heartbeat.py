"""Signs of life: each rank tells the clan's store that it lives, and looks whether the next rank does.

A collective notices a dead peer where its transport does: gloo at once, NCCL perhaps never. This notices it
whatever training waits in, at two small questions per rank and beat, and spreads the word: who sees a failure first
writes it down, and all others leave within a beat.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from torch.distributed import DistError, Store

_FAILED = "failed"


class Heartbeat:
    """Two threads: one talks to the store, and one watches that the store answers it.

    Silence is counted in beats of this process and not by the clock: one that was itself suspended has not seen
    the others be silent.

    Args:
        store: a connection of its own; a call on one that another thread waits on would wait as well.
        rank, size: this rank and how many there are; it watches the next one, the last watches the first.
        name: a rank's number to what messages call it.
        silence_s: seconds without a sign after which a rank, or the store, counts as gone.
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
        """No further beat, and no word to ``on_failure``."""
        self._is_over.set()

    def tell(self, reason: str) -> str:
        """Writes a failure down for the others; what the first to see one wrote, which may be somebody else."""
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
            last, same = seen, same + 1 if seen == last else 0
            if failure is None and same * self._beat_s > self._silence_s:
                failure = self.tell(f"{self._name(self._next)} gave no sign of life for {self._silence_s:g} s")
            if failure is not None:
                self._fail(failure)
                return
            self._is_over.wait(self._beat_s)

    def _watch(self) -> None:
        while not self._is_over.wait(self._beat_s):
            self._unanswered += 1
            if self._unanswered * self._beat_s > self._silence_s:
                self._fail(f"the clan's store gave no answer for {self._silence_s:g} s")
                return

    def _fail(self, reason: str) -> None:
        if self._once.acquire(blocking=False) and not self._is_over.is_set():
            self._on_failure(reason)
