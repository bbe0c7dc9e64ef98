"""Runs a function on several gloo ranks, started from a fork server that has torch and DeepSpeed loaded."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _enter(function: Callable, rank: int, world_size: int, port: int, directory: str, args: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    torch.set_num_threads(1)
    try:
        outcome = pickle.dumps((True, function(*args)))
        succeeded = True
    except BaseException as error:  # whatever it is, the test's process must hear of it
        outcome = pickle.dumps((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        succeeded = False
    path = Path(directory) / f"rank{rank}"
    path.with_suffix(".part").write_bytes(outcome)
    path.with_suffix(".part").rename(path)
    # A rank that is done stays until all are: leaving early would look like a dead peer to the others.
    deadline = time.monotonic() + 60
    while len(list(Path(directory).glob("rank?"))) + len(list(Path(directory).glob("rank??"))) < world_size:
        if time.monotonic() > deadline or not succeeded:
            break
        time.sleep(0.01)
    os._exit(0)


class RankError(AssertionError):
    """A rank raised; the message holds its traceback."""


_servers: dict[str, forkserver.ForkServer] = {}


@contextmanager
def _server(preload: str) -> Iterator[None]:
    """Inside, processes are forked from the server that has ``preload`` loaded; it starts with the first of them.

    Python has one fork server; engines that take many seconds to import get one of their own.
    """
    if preload not in _servers:
        _servers[preload] = forkserver.ForkServer()
        _servers[preload].set_forkserver_preload(["torch", preload])
    before = forkserver.connect_to_new_process
    forkserver.connect_to_new_process = _servers[preload].connect_to_new_process
    try:
        yield
    finally:
        forkserver.connect_to_new_process = before


def run_ranks(
    world_size: int, function: Callable, *args: Any, timeout_s: float = 120, preload: str = "tests.preload"
) -> list[Any]:
    """``function(*args)`` on each of ``world_size`` ranks; their return values (pickled) by rank.

    Args:
        world_size: number of ranks.
        function, args: at module level, and what can be pickled.
        timeout_s: for all ranks to return.
        preload: the module that the ranks find loaded.

    Raises:
        RankError: with the first failing rank's traceback, or the ranks that did not finish in time.
    """
    context = multiprocessing.get_context("forkserver")
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            context.Process(target=_enter, args=(function, rank, world_size, port, directory, args), daemon=True)
            for rank in range(world_size)
        ]
        with _server(preload):
            for process in processes:
                process.start()
        try:
            return _collect(Path(directory), world_size, timeout_s, processes)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(directory: Path, world_size: int, timeout_s: float, processes: list) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < world_size:
        for rank in range(world_size):
            path = directory / f"rank{rank}"
            if rank in results or not path.exists():
                continue
            succeeded, value = pickle.loads(path.read_bytes())
            if not succeeded:
                raise RankError(f"rank {rank} of {world_size} failed:\n{value}")
            results[rank] = value
        died = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0) and r not in results]
        if died and not any((directory / f"rank{r}").exists() for r in died):
            raise RankError(f"ranks {died} died with exit codes {[processes[r].exitcode for r in died]}")
        if time.monotonic() > deadline:
            raise RankError(f"after {timeout_s} s only ranks {sorted(results)} of {world_size} were done")
        time.sleep(0.01)
    return [results[rank] for rank in range(world_size)]
