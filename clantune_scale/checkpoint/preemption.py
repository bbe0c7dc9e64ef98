"""SIGTERM: the scheduler wants the machines back. All ranks stop after the same step, with its state on disk.

A signal may reach ranks at different moments, or only some of them, so the handler only sets a flag. Ranks compare
flags about once a second, at a step that they agreed on before. They also exchange how long their steps take, and
derive the step of the next comparison. All other steps cost one comparison of integers.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from clantune_scale.checkpoint.all_ranks import Everyone
from clantune_scale.config.schema import CheckpointConfig
from clantune_scale.distributed import world

logger = logging.getLogger(__name__)

#: The exit status that a shell reports for a process ended by SIGTERM.
STATUS = 128 + signal.SIGTERM
_POLL_S = 1.0
_MOST_STEPS = 10_000
# Before the first comparison no step time is known, and the first steps are slow.
_FIRST_STEPS = 8
# Time to close the run's trackers, which may wait for a server.
_CLOSING_S = 12.0


class Preemption:
    """Handles SIGTERM from :meth:`start` to :meth:`release`.

    A second SIGTERM, or the end of the grace period, has the effect that SIGTERM had before.

    Args:
        everyone: all ranks.
        settings: the block's ``checkpoint`` part.
    """

    def __init__(self, everyone: Everyone, settings: CheckpointConfig) -> None:
        self._everyone, self._grace_s = everyone, settings.grace_s
        self._poll_s = min(_POLL_S, settings.grace_s / 10)
        self._next = 0
        self._since = (0, time.monotonic())
        self._is_flagged = False
        self._previous: Any = None
        self._timer: threading.Timer | None = None
        # Only the main thread may set signal handlers; a run on another thread has none.
        self._handles = threading.current_thread() is threading.main_thread()

    def start(self, step: int) -> None:
        """Installs the handler; ``step`` optimizer steps are done."""
        if self._handles:
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        self._since = (step, time.monotonic())
        self._next = step + _FIRST_STEPS

    def meets(self, step: int) -> bool:
        """Whether ranks compare flags after ``step`` optimizer steps; they may exchange other things there too."""
        return step >= self._next

    def is_due(self, step: int) -> bool:
        """Whether the run ends here, after ``step`` optimizer steps; all ranks of the clan call it after each one."""
        if not self.meets(step):
            return False
        before, then = self._since
        now = time.monotonic()
        step_s = (now - then) / max(1, step - before)
        said = self._everyone.gather([self._is_flagged, step_s])
        slowest = max(seconds for _, seconds in said)
        self._since = (step, now)
        self._next = step + min(_MOST_STEPS, max(1, int(self._poll_s / max(slowest, 1e-9))))
        return any(flag for flag, _ in said)

    def leave(self) -> None:
        """Ends this process once all ranks call it: one of them serves the store that all use.

        Raises:
            SystemExit: always.
        """
        self._everyone.gather(None)
        sys.exit(STATUS)

    def release(self) -> None:
        """Puts the previous handler back. A second call does nothing."""
        if self._timer is not None:
            self._timer.cancel()
        if self._handles and signal.getsignal(signal.SIGTERM) == self._on_signal:
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)
        self._handles = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_flagged:
            self._do_as_before(number, frame)
            return
        self._is_flagged = True
        joined = world.current()
        if joined is not None and joined.supervisor is not None:
            # Later failures come from ranks that leave, and must not cause a restart.
            joined.supervisor.withdraw()
        self._timer = threading.Timer(self._grace_s, self._give_up)
        self._timer.daemon = True
        self._timer.start()

    def _do_as_before(self, number: int, frame: FrameType | None) -> None:
        self.release()
        if callable(self._previous):
            self._previous(number, frame)
        elif self._previous != signal.SIG_IGN:
            os.kill(os.getpid(), number)

    def _give_up(self) -> None:
        """Ends the process without a commit. It runs on a thread: the main one may wait for a dead rank."""
        logger.error(
            "clan: no state could be committed within the %g s of clantune.checkpoint.grace_s after SIGTERM; the last "
            "committed round remains.",
            self._grace_s,
        )
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_CLOSING_S)
        os._exit(STATUS)
