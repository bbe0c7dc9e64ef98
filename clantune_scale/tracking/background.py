"""Hands events to a slow consumer on a separate thread, so that training never waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Protocol

from clantune_scale.errors import RecordingStopped

Event = dict[str, Any]
#: What a recorder in another process says when the store has every event.
RECORDED = "recorded"


class EventConsumer(Protocol):
    """What consumes events, one after the other, on the background thread."""

    def record(self, event: Event) -> None:
        """Takes one event. An exception here ends the recording, and the run goes on."""

    @property
    def has_all(self) -> bool:
        """Whether every event is recorded, and ``close`` waits for something else."""

    def close(self) -> None:
        """Returns when everything is recorded. Called once, after the last event."""


class Background:
    """A daemon thread with a bounded queue in front of a recorder.

    Args:
        make_recorder: builds the recorder, on the thread, because imports and connections are slow too.
        capacity: events that may wait. One more is a failure, because the recorder is then slower than the run.
    """

    def __init__(self, make_recorder: Callable[[], EventConsumer], *, capacity: int = 10_000) -> None:
        self._make_recorder = make_recorder
        self._capacity = capacity
        # SimpleQueue.put is reentrant. The SIGTERM handler may interrupt a put, and puts the last event itself.
        self._queue: SimpleQueue[Event | None] = SimpleQueue()
        self._failure: str | None = None
        self._recorder: EventConsumer | None = None
        self._is_late = self._is_sent = False
        self._thread = threading.Thread(target=self._run, name="clantune-tracking", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> str | None:
        """Why the recording stopped; None while it works."""
        return self._failure

    @property
    def is_late(self) -> bool:
        """Whether :meth:`close` returned when all events were recorded, and files that follow them were not."""
        return self._is_late

    @property
    def is_sent(self) -> bool:
        """Whether :meth:`close` gave up when all events had been handed over, and were not confirmed."""
        return self._is_sent

    @property
    def num_waiting(self) -> int:
        """Events that are queued and not yet taken up."""
        return self._queue.qsize()

    def put(self, event: Event) -> None:
        """Queues an event and returns at once."""
        if self._failure is not None:
            return
        if self._queue.qsize() >= self._capacity:
            self._failure = f"{self._capacity} events are waiting"
            return
        self._queue.put(event)

    def close(self, *, deadline_s: float) -> None:
        """Waits at most ``deadline_s`` seconds until everything is recorded. Events that are left are a failure."""
        self._queue.put(None)
        self._thread.join(deadline_s)
        if not self._thread.is_alive() or self._failure is not None:
            return
        self._is_late = self._recorder is not None and self._recorder.has_all
        if not self._is_late:
            # The mark of the end waits with them.
            left = max(self._queue.qsize() - 1, 0)
            self._is_sent = left == 0
            self._failure = (
                f"{left} events were still waiting after {deadline_s:g} s"
                if left
                else f"the last events were sent, and not confirmed after {deadline_s:g} s; they may still arrive"
            )

    def _run(self) -> None:
        try:
            self._recorder = self._make_recorder()
            while (event := self._queue.get()) is not None and self._failure is None:
                self._recorder.record(event)
            self._recorder.close()
        # Whatever a tracking server or its client raises must not reach training. It is kept and reported.
        except Exception as error:
            self._failure = self._failure or in_short(error)


def in_short(error: Exception) -> str:
    """An exception in one line of at most 300 letters."""
    text = " ".join((str(error) if isinstance(error, RecordingStopped) else f"{type(error).__name__}: {error}").split())
    return text if len(text) <= 300 else text[:297] + "..."
