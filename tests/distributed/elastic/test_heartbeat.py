"""Signs of life on a store, with threads in place of processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import PrefixStore, TCPStore

from clantune_scale.distributed.elastic.heartbeat import Heartbeat


@pytest.fixture
def served():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))


class Listener:
    def __init__(self):
        self.heard, self.reasons = threading.Event(), []

    def __call__(self, reason):
        self.reasons.append(reason)
        self.heard.set()


def heartbeats(served, size, silence_s=1.0):
    listeners = [Listener() for _ in range(size)]
    made = [
        Heartbeat(
            PrefixStore("clan", served).clone(),
            rank=rank,
            size=size,
            name=lambda rank: f"rank {rank}",
            silence_s=silence_s,
            on_failure=listeners[rank],
        )
        for rank in range(size)
    ]
    return made, listeners


def test_who_falls_silent_is_missed_and_all_hear_of_it(served):
    made, listeners = heartbeats(served, 3)
    time.sleep(1.5)
    assert not any(listener.reasons for listener in listeners)
    made[1].stop()
    for rank in (0, 2):
        assert listeners[rank].heard.wait(5)
        assert listeners[rank].reasons == ["rank 1 gave no sign of life for 1 s"]
    assert listeners[1].reasons == []


def test_what_was_seen_first_is_what_all_hear(served):
    made, listeners = heartbeats(served, 3, silence_s=10.0)
    assert made[0].tell("the first") == "the first"
    assert made[1].tell("the second") == "the first"
    for listener in listeners:
        assert listener.heard.wait(5) and listener.reasons == ["the first"]


def test_a_store_that_is_gone_is_a_failure():
    process, port = _serve(multiprocessing.get_context("spawn"))
    client = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
    _, (listener,) = heartbeats(client, 1)
    process.kill()
    assert listener.heard.wait(10) and "the clan's store is gone" in listener.reasons[0]


def test_a_store_whose_host_is_frozen_is_a_failure():
    process, port = _serve(multiprocessing.get_context("spawn"))
    client = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5))
    _, (listener,) = heartbeats(client, 1)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        assert listener.heard.wait(10)
        assert listener.reasons == ["the clan's store gave no answer for 1 s"]
    finally:
        process.kill()


def _host(queue):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    queue.put(store.port)
    time.sleep(60)


def _serve(context):
    queue = context.Queue()
    process = context.Process(target=_host, args=(queue,), daemon=True)
    process.start()
    return process, queue.get(timeout=60)
