"""Follows a run's events file as it grows and prints the lines that rank 0 prints."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from clantune_scale.errors import ClanError
from clantune_scale.tracking import uri as uris
from clantune_scale.tracking.background import Event
from clantune_scale.tracking.events import check_schema, parse_event
from clantune_scale.tracking.live import Screen, screen
from clantune_scale.tracking.terminal import Terminal

# Time without an event after which a message is printed: longer than the evaluation of most rounds.
_SILENCE_S = 600.0


def watch(
    run_dir: str | os.PathLike[str],
    *,
    on: Screen | None = None,
    poll_s: float = 1.0,
    timeout_s: float | None = None,
    past_rounds: int = 3,
) -> str | None:
    """Prints a run's lines and tables until it ends; a finished run's last ones at once.

    Args:
        run_dir: folder of the run; it need not be there yet.
        on: where it is printed; standard output if None, live if that is a terminal.
        poll_s: seconds between two reads of the file.
        timeout_s: seconds without an event after which watching ends; None waits for ever.
        past_rounds: rounds that were over when watching began and are still shown; the rest is counted.

    Returns:
        The status that the run ended with; None if ``timeout_s`` ran out.

    Raises:
        ClanError: if a line that is complete is no event, or of a newer version.
    """
    path = Path(run_dir) / "events.jsonl"
    shown_on = on or screen()
    follower = _Follower(path, shown_on, poll_s=poll_s, timeout_s=timeout_s)
    terminal: Terminal | None = None
    try:
        for event in _without_the_past(follower.events(), follower, past_rounds=past_rounds, on=shown_on):
            if event["kind"] == "run_start":
                terminal = Terminal(events_path=path, mlflow_hint=_hint(event, path), on=shown_on)
            if terminal is not None:
                terminal.show(event)
            if event["kind"] == "run_end":
                return event["status"]
    finally:
        shown_on.status("")
    return None


class _Follower:
    """Reads complete lines of a growing file.

    Attributes:
        is_behind: whether the event that was given last was followed by another when it was read.
    """

    def __init__(self, path: Path, on: Screen, *, poll_s: float, timeout_s: float | None) -> None:
        self._path, self._screen = path, on
        self._poll_s, self._timeout_s = poll_s, timeout_s
        self.is_behind = True

    def events(self) -> Iterator[Event]:
        """All events of the file and each new one, until the time-out without a new one."""
        if not self._wait_for(self._path.exists, f"waiting for {self._path}"):
            return
        told_s = last_s = -math.inf
        is_over = False
        while not is_over:
            with open(self._path, "rb") as file:
                for event in self._lines(file):
                    # In a file that has taken the place of another (a run was resumed), the past is told already.
                    if event["time_s"] > told_s:
                        last_s = max(last_s, event["time_s"])
                        yield event
                is_over = not self._is_replaced(file)
            told_s = last_s

    def _lines(self, file: BinaryIO) -> Iterator[Event]:
        """Events of one file, until nothing comes for too long or another file has taken its place."""
        incomplete, number = b"", 0
        while True:
            chunk = file.readline()
            # Without its end a line is still being written: the rest comes with a later look.
            incomplete += chunk
            if incomplete.endswith(b"\n"):
                number += 1
                event = self._parse(incomplete, number)
                incomplete = b""
                if event is not None:
                    self.is_behind = file.tell() < os.fstat(file.fileno()).st_size
                    yield event
            elif not chunk:
                has_come = self._wait_for(lambda: _has_more(file) or self._is_replaced(file), self._silence())
                if not has_come or not _has_more(file):
                    return

    def _is_replaced(self, file: BinaryIO) -> bool:
        """Whether the path leads to another file now: a run that is resumed writes a new one (``cut_events``)."""
        try:
            return os.stat(self._path).st_ino != os.fstat(file.fileno()).st_ino
        except FileNotFoundError:
            return False

    def _parse(self, line: bytes, number: int) -> Event | None:
        try:
            event = parse_event(line)
        except ValueError as error:
            raise ClanError(
                f"line {number} of {self._path} is not an event: {error}. Use a copy without it."
            ) from error
        if event is not None:
            check_schema(event, self._path)
        return event

    def _wait_for(self, is_true: Callable[[], bool], message: str) -> bool:
        """Looks again and again; says so once where that takes long, and gives up after the time-out."""
        began, has_told = time.monotonic(), False
        patience = _SILENCE_S if self._path.exists() else 0.0
        while not is_true():
            waited = time.monotonic() - began
            if self._timeout_s is not None and waited >= self._timeout_s:
                return False
            if waited >= patience and not has_told:
                has_told = True
                self._screen.line(message)
            time.sleep(self._poll_s)
        return True

    def _silence(self) -> str:
        return (
            f"no event for {_SILENCE_S / 60:.0f} minutes: either a round is that long, or the run died silently "
            f"(Ctrl-C ends watching)"
        )


def _without_the_past(events: Iterator[Event], follower: _Follower, *, past_rounds: int, on: Screen) -> Iterator[Event]:
    """The start, then the last rounds of what was there, then everything as it comes."""
    past: list[list[Event]] = [[]]
    left_out = 0
    for event in events:
        if event["kind"] == "run_start":
            yield event
        else:
            past[-1].append(event)
        if event["kind"] == "round_end":
            past.append([])
            if len(past) > past_rounds + 1:
                past.pop(0)
                left_out += 1
        if not follower.is_behind:
            break
    if left_out:
        on.line(f"({left_out} earlier rounds are in the events file)")
    for some in past:
        yield from some
    yield from events


def _has_more(file: Any) -> bool:
    return os.fstat(file.fileno()).st_size > file.tell()


def _hint(start: Event, path: Path) -> str | None:
    """Where the run is in MLflow, as far as its config tells: another process's environment is not known."""
    tracking: Mapping[str, Any] = start["config"]["tracking"]
    if not tracking["mlflow"]:
        return None
    database = path.parent.parent / "mlflow.db"
    configured = tracking["tracking_uri"] or (
        uris.resolve(None, directory=database.parent) if database.exists() else None
    )
    return uris.hint(configured) if configured else None
