"""The last line of a terminal, which is overwritten while a round goes on. It never reaches a log file.

A stream that cannot print a letter gets another one for it. One that cannot be written to ends no training.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import sys
from collections.abc import Callable
from typing import Protocol, TextIO

from clantune_scale.tracking.background import Event

_ERASE_LINE = "\r\x1b[2K"
# For encodings without these letters; others are escaped.
_PLAIN = {"±": "+-"}

logger = logging.getLogger(__name__)


class Screen(Protocol):
    """Where lines go."""

    def line(self, text: str) -> None:
        """Prints a line that stays."""

    def status(self, text: str) -> bool:
        """Shows where the run is. Returns False if it cannot, so that a line must say it."""


class Lines:
    """Only lines that stay: for a log file, a pipe, SLURM.

    Args:
        stream: where they go; if None, what ``sys.stdout`` is at each call.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def line(self, text: str) -> None:
        """Prints a line that stays."""
        _write(self._stream or sys.stdout, text + "\n")

    def status(self, text: str) -> bool:
        """Shows nothing: a log keeps every line."""
        return False


class Live:
    """A terminal whose last line is overwritten.

    Args:
        stream: a terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown = ""

    def line(self, text: str) -> None:
        """Prints a line that stays, above the last one."""
        _write(self._stream, f"{_ERASE_LINE if self._shown else ''}{text}\n{self._shown}")

    def status(self, text: str) -> bool:
        """Overwrites the last line. An empty text removes it."""
        # A line that wraps could not be erased again.
        self._shown = text[: shutil.get_terminal_size().columns - 1]
        _write(self._stream, _ERASE_LINE + self._shown)
        return True


class Steady:
    """A screen that may fail: for a process that trains. What cannot be printed is left out, and that is told once.

    Args:
        on: the screen.
        stream: what it writes to; if None, what ``sys.stdout`` is at each call.
    """

    def __init__(self, on: Screen, stream: TextIO | None = None) -> None:
        self._on, self._stream = on, stream
        self._has_told = False

    def line(self, text: str) -> None:
        """Prints a line that stays."""
        self._attempt(lambda: self._on.line(text))

    def status(self, text: str) -> bool:
        """Shows where the run is. Returns False if it cannot, so that a line must say it."""
        return bool(self._attempt(lambda: self._on.status(text)))

    def _attempt(self, show: Callable[[], bool | None]) -> bool | None:
        try:
            return show()
        # ValueError is what Python says of a stream that is closed.
        except (OSError, ValueError) as error:
            _drop_buffer(self._stream or sys.stdout, for_ever=isinstance(error, BrokenPipeError))
            if not self._has_told:
                logger.warning("clan: standard output takes no lines (%s). Training goes on without them.", error)
            self._has_told = True
            return None


def screen(stream: TextIO | None = None) -> Screen:
    """:class:`Live` on a terminal that can erase a line, and :class:`Lines` elsewhere."""
    chosen = stream or sys.stdout
    is_live = not chosen.closed and chosen.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return Live(chosen) if is_live else Lines(stream)


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
    except UnicodeEncodeError as error:
        for letter, plain in _PLAIN.items():
            text = text.replace(letter, plain)
        stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
    stream.flush()


def _drop_buffer(stream: TextIO, *, for_ever: bool) -> None:
    """Empties a stream's buffer. Otherwise the next line of the script itself would fail, or the end of Python.

    Args:
        stream: that could not be written to.
        for_ever: whether its reader is gone, so that nobody will miss what is written from now on.
    """
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError, AttributeError, io.UnsupportedOperation):
        return
    null, own = os.open(os.devnull, os.O_WRONLY), os.dup(descriptor)
    try:
        os.dup2(null, descriptor)
        stream.flush()
    finally:
        if not for_ever:
            os.dup2(own, descriptor)
        os.close(null)
        os.close(own)


class Progress:
    """Where a run is, in one line, from its events."""

    def __init__(self) -> None:
        self._total: int | None = None
        self._began: tuple[int, float] | None = None
        self._phase = (0, "", 0, 0)

    def take(self, event: Event) -> str | None:
        """The line after this event; None if the event does not change it."""
        kind, step = event["kind"], event["step"]
        if kind in ("run_start", "resume"):
            self._total, self._began = event["total_steps"], (step, event["time_s"])
        elif kind == "phase_start":
            self._phase = (event["round"], event["phase"], step, event["num_steps"])
            return self._line(event)
        elif kind == "step":
            return f"{self._line(event)}  {training_loss(event)}{event['step_s']:.3f} s/step"
        return None

    def _line(self, event: Event) -> str:
        index, phase, start, length = self._phase
        step = event["step"]
        whole = f" of {self._total} ({step / self._total:.0%}{self._left(event)})" if self._total else ""
        return f"step {step}{whole}  round {index} {phase} {step - start}/{length}"

    def _left(self, event: Event) -> str:
        """The time that is left if the rest of the run is as fast as the run so far, evaluations included."""
        done = event["step"] - self._began[0] if self._began else 0
        if done <= 0 or self._began is None or self._total is None:
            return ""
        seconds = (event["time_s"] - self._began[1]) / done * (self._total - event["step"])
        hours, minutes = divmod(int(seconds / 60 + 0.5), 60)
        return f", {hours} h {minutes:02} min left" if hours else f", {minutes} min left"


def training_loss(event: Event) -> str:
    """The loss of a ``step`` event, for its line; empty if the run sees none (a model that returns logits)."""
    return "" if event["loss"] is None else f"loss {event['loss']:.4f}  "
