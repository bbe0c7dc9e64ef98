"""Ranks of this machine without a launcher, that die and start again, at a fraction of a real start's time.

Each life is a process forked from a server that has the engine loaded. Where the package would replace a process by a
new one of the same command, the harness starts the next life in its place, with the environment that was left to it.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clantune_scale.bench.faults.injector import Fault, install, to_environ
from clantune_scale.errors import ClanError

_AGAIN = 75


@dataclass(frozen=True)
class Ended:
    """How a rank ended.

    Attributes:
        code: its last life's exit code; negative for a signal.
        num_lives: how often it was started.
        text: what all its lives said.
    """

    code: int
    num_lives: int
    text: str


def run(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    faults: Iterable[Fault] = (),
    environ: Mapping[str, str] | None = None,
    preload: tuple[str, ...] = ("torch",),
    timeout_s: float = 120.0,
    patience_s: float | None = None,
) -> list[Ended]:
    """Runs ``function(*args)`` on each rank until all have ended but those that a fault has stopped.

    Args:
        world_size: number of ranks.
        function, args: what a rank's script would do; at module level, and what can be pickled.
        faults: that strike them.
        environ: further variables.
        preload: modules that each life finds loaded.
        timeout_s: for all to end.
        patience_s: once a rank has died, seconds until the others are killed too, as launchers do; never if None.

    Raises:
        ClanError: if some have not ended in time, with what they said last.
    """
    faults = list(faults)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    port = _free_port()
    may_stay = {fault.rank for fault in faults if fault.action == "stop"}
    with tempfile.TemporaryDirectory() as directory:
        ranks = [
            _Rank(context, Path(directory) / str(rank), _variables(rank, world_size, port, faults, environ or {}))
            for rank in range(world_size)
        ]
        try:
            for rank in ranks:
                rank.start(function, args)
            ends = time.monotonic() + timeout_s
            kill_at = float("inf")
            # All are asked each time: who is asked begins the next life.
            while not all([rank.has_ended(function, args) for n, rank in enumerate(ranks) if n not in may_stay]):  # noqa: C419
                if time.monotonic() > ends:
                    told = "\n".join(f"rank {n}: {rank.text()[-1500:]}" for n, rank in enumerate(ranks))
                    raise ClanError(f"ranks have not ended after {timeout_s:g} s:\n{told}")
                if patience_s is not None and any(rank.was_killed for rank in ranks):
                    kill_at = min(kill_at, time.monotonic() + patience_s)
                if time.monotonic() > kill_at:
                    for rank in ranks:
                        rank.kill()
                time.sleep(0.02)
        finally:
            for rank in ranks:
                rank.kill()
        return [rank.ended() for rank in ranks]


class _Rank:
    """One rank's lives."""

    def __init__(self, context: Any, place: Path, environ: dict[str, str]) -> None:
        self._context, self._place, self._environ = context, place, environ
        self._num_lives = 0
        self._process: Any = None

    def start(self, function: Callable[..., Any], args: tuple) -> None:
        self._num_lives += 1
        self._process = self._context.Process(target=_live, args=(self._environ, str(self._place), function, args))
        self._process.start()

    def has_ended(self, function: Callable[..., Any], args: tuple) -> bool:
        if self._process.exitcode == _AGAIN:
            self._environ = json.loads(self._place.with_suffix(".next").read_text())
            self.start(function, args)
        return self._process.exitcode is not None

    @property
    def was_killed(self) -> bool:
        return self._process.exitcode == -signal.SIGKILL

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()

    def text(self) -> str:
        path = self._place.with_suffix(".text")
        return path.read_text(errors="replace") if path.exists() else ""

    def ended(self) -> Ended:
        return Ended(self._process.exitcode, self._num_lives, self.text())


def _live(environ: dict[str, str], place: str, function: Callable[..., Any], args: tuple) -> None:
    """One life, with the end that the interpreter would give it."""
    os.environ.clear()
    os.environ.update(environ)
    text = os.open(f"{place}.text", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(text, 1)
    os.dup2(text, 2)
    import torch

    from clantune_scale.distributed.elastic import supervisor

    torch.set_num_threads(1)

    def hand_over(environ: Any) -> None:
        Path(f"{place}.next").write_text(json.dumps(dict(environ)))
        sys.stderr.flush()
        os._exit(_AGAIN)

    supervisor.restart_process = hand_over
    code = 0
    try:
        install()
        function(*args)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _variables(
    rank: int, world_size: int, port: int, faults: list[Fault], environ: Mapping[str, str]
) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CLANTUNE_")}
    launch = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
        "DS_ACCELERATOR": "cpu",
    }
    return kept | {name: str(value) for name, value in launch.items()} | to_environ(faults) | dict(environ)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
