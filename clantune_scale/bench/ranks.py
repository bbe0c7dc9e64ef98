"""Gloo ranks on this machine that wait, without using a core, until they are told to train some steps.

So two sets of ranks can be measured in turns within one run, and other load on the machine affects both alike.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from clantune_scale.errors import ClanError


class Trainer(Protocol):
    """What a rank builds once and then runs on command."""

    def train(self, kind: str, num_steps: int) -> Any:
        """Trains ``num_steps`` as ``kind`` says. The returned value is sent back."""


@dataclass(frozen=True)
class RankAddress:
    """A rank's place among the ranks that use one port."""

    rank: int
    world_size: int
    port: int

    def environ(self) -> dict[str, str]:
        """The variables that a launcher would set."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }


class Ranks:
    """A set of ranks, each with a trainer of its own.

    Args:
        world_size: number of ranks.
        build: makes a rank's trainer. It must be a function of a module, because processes find it by its name.
        *args: for ``build``.

    Attributes:
        processes: of the ranks, by rank.
    """

    def __init__(self, world_size: int, build: Callable[..., Trainer], *args: Any) -> None:
        # The server imports the engine once, and then forks each rank in a fraction of a second.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", build.__module__])
        port = _free_port()
        self.processes, self._connections = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            place = RankAddress(rank, world_size, port)
            process = context.Process(target=_serve, args=(theirs, place, build, args), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self._connections.append(ours)

    def train(self, kind: str, num_steps: int) -> list[Any]:
        """What each rank's trainer returned, by rank.

        Raises:
            ClanError: with the traceback of the first rank that failed.
        """
        for connection in self._connections:
            # A rank that failed earlier has sent its reason, which is read below.
            with suppress(BrokenPipeError):
                connection.send((kind, num_steps))
        return [self._answer(rank) for rank in range(len(self._connections))]

    def close(self) -> None:
        """Ends the ranks."""
        for process in self.processes:
            process.kill()
            process.join()

    def _answer(self, rank: int) -> Any:
        try:
            succeeded, value = self._connections[rank].recv()
        except EOFError:
            succeeded, value = False, "it died without a word"
        if not succeeded:
            raise ClanError(f"rank {rank} of {len(self.processes)} failed: {value}. Mend that, and measure again.")
        return value


def timed(step: Callable[[], Any], num_steps: int) -> float:
    """Mean seconds that a call of ``step`` takes."""
    start = time.perf_counter()
    for _ in range(num_steps):
        step()
    return (time.perf_counter() - start) / num_steps


def _serve(connection: Connection, place: RankAddress, build: Callable[..., Trainer], args: tuple) -> None:
    os.environ.update(place.environ())
    import torch

    torch.set_num_threads(1)
    try:
        trainer = build(*args)
        while True:
            connection.send((True, trainer.train(*connection.recv())))
    except EOFError:
        return
    except Exception:
        connection.send((False, traceback.format_exc()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
