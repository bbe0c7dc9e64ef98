"""Restarts this process in place: same process id and arguments, with no descriptor or child process left over."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import MutableMapping

#: The folder that the process was started in. A script may change it after this module was imported.
_STARTED_IN = os.getcwd()


def restart_process(environ: MutableMapping[str, str] = os.environ) -> None:
    """Replaces this process by a new one of the same command. It does not return.

    Args:
        environ: the environment of the new process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    _end_workers()
    _close_on_exec()
    os.chdir(_STARTED_IN)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], dict(environ))


def _end_workers() -> None:
    """Kills data loader workers. They end when their parent's process id changes, and ``exec`` keeps it."""
    for worker in multiprocessing.active_children():
        worker.kill()


def _close_on_exec() -> None:
    """Closes all descriptors on ``exec``. Torch leaves some open, and peers would not see that this process is gone."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if int(name) > 2:
                os.set_inheritable(int(name), False)
        except OSError:
            continue  # the folder's own descriptor, closed by now
