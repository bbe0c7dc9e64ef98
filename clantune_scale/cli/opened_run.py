"""RUN on the command line: from a folder, an events file or a name to what is known of the run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clantune_scale.core.lineage import Lineage
from clantune_scale.core.schedule import ClanSchedule
from clantune_scale.errors import ClanError
from clantune_scale.tracking.events import read_events
from clantune_scale.tracking.history import end_of, lineage_from_events, schedule_from_events, start_of

EVENTS = "events.jsonl"


@dataclass(frozen=True)
class OpenedRun:
    """A run that is over, or one that goes on while it is read.

    Attributes:
        folder: where it lies.
        events: all of them so far, oldest first.
    """

    folder: Path
    events: Sequence[Mapping[str, Any]]

    @property
    def start(self) -> Mapping[str, Any]:
        """Its ``run_start`` event."""
        return start_of(self.events)

    @property
    def status(self) -> str:
        """``FINISHED``, ``FAILED``, ``KILLED``, or ``RUNNING`` if no end is recorded."""
        end = end_of(self.events)
        return end["status"] if end else "RUNNING"

    def lineage(self) -> Lineage:
        """Of all finished rounds."""
        return lineage_from_events(self.events)

    def schedule(self, member: int | None = None) -> ClanSchedule:
        """The champion's, as the run wrote it, else read back from its events; another member's from its events."""
        written = self.folder / "schedule.json"
        if member is None and end_of(self.events) is not None and written.exists():
            return ClanSchedule.from_json(written.read_text(encoding="utf-8"))
        return schedule_from_events(self.events, member=member)


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """The positional argument RUN."""
    parser.add_argument("run_path", metavar="RUN", help="a run's folder, its events.jsonl, or its name in ./clan_runs")


def find_run(name: str) -> Path:
    """The folder of the run that ``name`` means.

    Raises:
        ClanError: if there is none.
    """
    for path in (Path(name), Path("clan_runs") / name):
        folder = path.parent if path.name == EVENTS else path
        if (folder / EVENTS).is_file():
            return folder
    raise ClanError(f"{name!r} is no run: there is no {EVENTS} in it. Give a run's folder, or its name in ./clan_runs.")


def open_run(name: str) -> OpenedRun:
    """Reads a run.

    Raises:
        ClanError: if there is none, it was written by a newer version, or its events are damaged.
    """
    folder = find_run(name)
    try:
        events = read_events(folder / EVENTS)
        kinds = {event["kind"] for event in events}
    except (KeyError, TypeError, UnicodeDecodeError) as error:
        raise ClanError(f"{folder / EVENTS} has a line that is no event ({error!r}). Use a copy without it.") from error
    if "run_start" not in kinds:
        raise ClanError(f"{folder / EVENTS} has no run_start: the run has not begun. Try again in a moment.")
    return OpenedRun(folder, events)
