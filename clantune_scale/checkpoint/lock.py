"""A lock that lets one process at a time work in a run's folder."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from clantune_scale.errors import CheckpointError

NAME = ".lock"
_BEAT_S = 15.0
_STALE_S = 90.0


class RunLock:
    """A file in the run's folder that names the process that works there. The process touches it while it runs.

    A lock whose process is gone is taken over. On this host, a process is gone if none has its id and start time. On
    another host, it is gone if the file is not touched for a minute and a half.

    Args:
        run_dir: the run's folder.
        stale_s: seconds without a touch after which a lock of another host counts as abandoned.
        generation: (launch, number) that this process is in. It takes over from earlier generations of its own
            launch: their leader counts as dead, even if it is only frozen.

    Raises:
        CheckpointError: if another process works there.
    """

    def __init__(self, run_dir: Path, *, stale_s: float = _STALE_S, generation: tuple[str, int] | None = None) -> None:
        self._path = run_dir / NAME
        self._stale_s = stale_s
        self._own = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
        if generation is not None:
            self._own |= {"launch": generation[0], "generation": generation[1]}
        self._is_over = threading.Event()
        while not self._create():
            self._remove_if_left_behind()
        self._thread = threading.Thread(target=self._beat, name="clantune-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Removes the lock. A second call does nothing."""
        if not self._is_over.is_set():
            self._is_over.set()
            if self._holder() == self._own:
                self._path.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with open(descriptor, "w") as file:
            json.dump(self._own, file)
        return True

    def _remove_if_left_behind(self) -> None:
        holder = self._holder()
        try:
            touched = self._path.stat().st_mtime_ns
        except FileNotFoundError:
            return
        is_of_launch = "launch" in self._own and holder.get("launch") == self._own["launch"]
        if is_of_launch and holder["generation"] < self._own["generation"]:
            self._path.unlink(missing_ok=True)
            return
        is_here = holder.get("host") == socket.gethostname()
        if is_here:
            is_alive = holder["pid"] != os.getpid() and _started(holder["pid"]) == holder["started"]
        else:
            is_alive = self._is_touched(touched)
        if is_alive:
            raise CheckpointError(
                f"{self._path.parent} is being written by process {holder.get('pid')} on {holder.get('host')}: two "
                f"launches of one run would corrupt it. End the other one, or give this one another tracking.run_name."
            )
        self._path.unlink(missing_ok=True)

    def _holder(self) -> dict[str, Any]:
        """The file's content; empty if there is no file or it is not written yet."""
        try:
            return json.loads(self._path.read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def _is_touched(self, before: int) -> bool:
        """Whether the other host touches the file while this one waits: two hosts' clocks cannot be compared."""
        deadline = time.monotonic() + self._stale_s
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._stale_s / 4))
            try:
                if self._path.stat().st_mtime_ns != before:
                    return True
            except FileNotFoundError:
                return False
        return False

    def _beat(self) -> None:
        while not self._is_over.wait(_BEAT_S):
            try:
                os.utime(self._path)
            except FileNotFoundError:
                return


def _started(pid: int) -> str | None:
    """The kernel tick at which a process of this host started, or None. The kernel reuses process ids."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except FileNotFoundError:
        return None
