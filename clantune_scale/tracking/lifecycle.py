"""The run's status on every way out: the end, an exception, SIGTERM."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"


class Lifecycle:
    """Calls ``close(status)`` when the process ends without having closed the run itself.

    The constructor sets the hooks, and :meth:`release` restores the previous ones. Closing the run calls it. A hook
    that other code has set on top of ours meanwhile stays.

    Args:
        close: closes the run with a status. A second call must do nothing.
    """

    def __init__(self, close: Callable[[str], None]) -> None:
        self._close = close
        self._previous_excepthook = sys.excepthook
        sys.excepthook = self._on_exception
        self._previous_sigterm: Any = None
        # Only the main thread may set signal handlers. A run that another thread starts has none.
        self._handles_sigterm = threading.current_thread() is threading.main_thread()
        if self._handles_sigterm:
            self._previous_sigterm = signal.signal(signal.SIGTERM, self._on_sigterm)
        atexit.register(self._on_exit)

    def release(self) -> None:
        """Restores the previous hooks."""
        atexit.unregister(self._on_exit)
        if sys.excepthook == self._on_exception:
            sys.excepthook = self._previous_excepthook
        on_main_thread = threading.current_thread() is threading.main_thread()
        if self._handles_sigterm and on_main_thread and signal.getsignal(signal.SIGTERM) == self._on_sigterm:
            # None means that the handler was not set from Python and cannot be restored. The default is nearest.
            signal.signal(signal.SIGTERM, self._previous_sigterm or signal.SIG_DFL)
        self._handles_sigterm = False

    def _on_exception(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        previous = self._previous_excepthook
        self._close(KILLED if issubclass(kind, KeyboardInterrupt) else FAILED)
        previous(kind, error, traceback)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous_sigterm
        try:
            self._close(KILLED)
        finally:
            if callable(previous):
                previous(number, frame)
            elif previous != signal.SIG_IGN:
                # As without our hook: the default action ends the process with the signal's own status.
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)

    def _on_exit(self) -> None:
        self._close(FINISHED)
