"""A recorder in a process of its own.

MLflow's client holds Python's lock for some tenths of a second per round. A thread of the training process that did
this would delay every operation in that time, because each operation waits for the lock anew.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from clantune_scale.errors import RecordingStopped
from clantune_scale.tracking.background import RECORDED, Event


class Sender:
    """Passes events on to ``python -m clantune_scale.tracking.receiver``, each as a line of JSON.

    The other process ignores the signals that end this one, and ends when it has sent everything. If this process is
    killed, the other one closes the run as killed.

    Args:
        settings: arguments of :class:`clantune_scale.tracking.mlflow.MlflowRecorder`. They go through the pipe, because
            the URI may have credentials, and everyone can read a command line.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "clantune_scale.tracking.receiver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
        )
        self._has_all = False
        self._write(settings)

    @property
    def has_all(self) -> bool:
        """Whether the store has every event; files may follow."""
        return self._has_all

    def record(self, event: Event) -> None:
        """Passes one event on.

        Raises:
            RecordingStopped: with its reason, if the other process has ended.
        """
        self._write(event)

    def close(self) -> None:
        """Waits until everything is sent.

        Raises:
            RecordingStopped: with the reason, if something was not sent.
        """
        self._end(is_failure=False)

    def _write(self, data: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(data).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._end(is_failure=True)

    def _end(self, *, is_failure: bool) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        # The other process writes that it has recorded everything, or why it failed. What is left in our buffer then
        # has no reader.
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        first = self._process.stdout.readline()
        self._has_all = first.decode(errors="replace").strip() == RECORDED
        said = (b"" if self._has_all else first) + self._process.stdout.read()
        self._process.stdout.close()
        status = self._process.wait()
        if is_failure or status != 0:
            raise RecordingStopped(said.decode(errors="replace").strip() or f"its process ended with status {status}")
