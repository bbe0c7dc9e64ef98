"""A lock of a file, which one process of this host, or of all that share its folder, holds at a time."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path


@contextmanager
def one_at_a_time(path: Path | None) -> Iterator[None]:
    """Waits until no other process is inside for the same path. The kernel frees the lock of a process that dies.

    Args:
        path: of the file; the lock is a file beside it. None for nothing to wait for.
    """
    with ExitStack() as held:
        if path is not None:
            beside = path.with_name(f".{path.name}.lock")
            # A folder that takes no file, or has no locks as some network file systems, is MLflow's to complain of.
            with suppress(OSError):
                fcntl.flock(held.enter_context(open(beside, "w")), fcntl.LOCK_EX)
        yield
