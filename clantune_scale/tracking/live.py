"""The last line of a terminal, which is overwritten while a round goes on. It never reaches a log file."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Protocol, TextIO

from clantune_scale.tracking.background import Event

_ERASE_LINE = "\r\x1b[2K"


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
        print(text, file=self._stream or sys.stdout, flush=True)

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
        self._stream.write(f"{_ERASE_LINE if self._shown else ''}{text}\n{self._shown}")
        self._stream.flush()

    def status(self, text: str) -> bool:
        """Overwrites the last line. An empty text removes it."""
        # A line that wraps could not be erased again.
        self._shown = text[: shutil.get_terminal_size().columns - 1]
        self._stream.write(_ERASE_LINE + self._shown)
        self._stream.flush()
        return True


def screen(stream: TextIO | None = None) -> Screen:
    """:class:`Live` on a terminal that can erase a line, and :class:`Lines` elsewhere."""
    chosen = stream or sys.stdout
    is_live = chosen.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return Live(chosen) if is_live else Lines(stream)


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
