"""The thread between training and a slow consumer: order, failure, fullness, deadline."""

from __future__ import annotations

import threading
import time

from clantune_scale.tracking.background import Background


class Closes:
    closed = 0
    has_all = False

    def close(self):
        self.closed += 1


class Keeps(Closes):
    def __init__(self):
        self.events = []

    def record(self, event):
        self.events.append(event["step"])


def test_events_arrive_in_order():
    recorder = Keeps()
    background = Background(lambda: recorder)
    for step in range(100):
        background.put({"step": step})
    background.close(deadline_s=10)
    assert recorder.events == list(range(100)) and background.failure is None and recorder.closed == 1


def test_a_recorder_that_cannot_be_made_is_a_failure_not_an_exception():
    def make():
        raise ConnectionError("nobody there")

    background = Background(make)
    background.close(deadline_s=10)
    assert background.failure == "ConnectionError: nobody there"
    background.put({"step": 1})


def test_a_hanging_recorder_holds_nobody_up():
    hang = threading.Event()

    class Hangs(Closes):
        def record(self, event):
            hang.wait(30)

    background = Background(Hangs)
    start_s = time.monotonic()
    for step in range(3):
        background.put({"step": step})
    background.close(deadline_s=0.2)
    waited_s = time.monotonic() - start_s
    hang.set()
    # The deadline, and a second for a machine with other work.
    assert waited_s < 1.2
    assert "still waiting after 0.2 s" in background.failure


def test_a_full_queue_is_a_failure():
    hang = threading.Event()

    class Hangs(Closes):
        def record(self, event):
            hang.wait(30)

    background = Background(Hangs, capacity=2)
    for step in range(5):
        background.put({"step": step})
    hang.set()
    assert background.failure == "2 events are waiting"
    background.close(deadline_s=5)


def test_files_that_are_late_are_no_failure_and_events_that_are_unconfirmed_are():
    for has_all in (True, False):
        hang = threading.Event()

        class Slow(Keeps):
            def close(self, hang=hang):
                hang.wait(30)

        recorder = Slow()
        recorder.has_all = has_all
        background = Background(lambda recorder=recorder: recorder)
        background.put({"step": 1})
        background.close(deadline_s=0.5)
        hang.set()
        assert recorder.events == [1]
        assert (background.is_late, background.failure is None, background.is_sent) == (has_all, has_all, not has_all)
    assert background.failure == "the last events were sent, and not confirmed after 0.5 s; they may still arrive"
