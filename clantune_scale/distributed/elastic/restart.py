"""This process, started again in place: same process id, same arguments, nothing of the old life left open."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping, MutableMapping

#: The folder that the process was started in, as far as that is known: a script may go to another one.
_STARTED_IN = os.getcwd()


def restart_process(environ: MutableMapping[str, str] = os.environ) -> None:
    """Replaces this process by a new one of the same command; returns never."""
    sys.stdout.flush()
    sys.stderr.flush()
    _end_workers()
    _close_on_exec()
    os.chdir(_STARTED_IN)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], _plain(environ))


def _end_workers() -> None:
    """Loader workers end when their parent's process id changes, and it does not."""
    for worker in multiprocessing.active_children():
        worker.kill()


def _close_on_exec() -> None:
    """Peers see that this process is gone when its connections close; torch leaves some of them open over an exec."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if int(name) > 2:
                os.set_inheritable(int(name), False)
        except OSError:
            continue  # the folder's own descriptor, closed by now


def _plain(environ: Mapping[str, str]) -> dict[str, str]:
    return dict(environ)
