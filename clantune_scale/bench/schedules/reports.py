"""The record of all reports: who looks at what is held back, leaves a line."""

from __future__ import annotations

import datetime
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

#: One line a report: date, commit, command. Committed, so that a report cannot be repeated unseen.
LOG = Path(__file__).parents[1] / "REPORTS.log"
#: Options whose values are places on a machine and change no number.
_PLACES = ("--out",)


def append(arguments: Sequence[str], *, log: Path | None = None) -> str:
    """Appends a report to the log.

    Args:
        arguments: of the command.
        log: the file; None for the repository's.

    Returns:
        The line.
    """
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    command = shlex.join(["python", "-m", "clantune_scale.bench.schedules", *_without_places(arguments)])
    line = f"{today} {commit()} {command}"
    with (log or LOG).open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    return line


def commit() -> str:
    """The tree's commit, with a plus if files differ from it; ``unknown`` outside a clone."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{LOG.name}")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=LOG.parent, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


def _without_places(arguments: Sequence[str]) -> list[str]:
    kept, skips = [], False
    for argument in arguments:
        if not skips and argument not in _PLACES and not argument.startswith(tuple(f"{name}=" for name in _PLACES)):
            kept.append(Path(argument).name if Path(argument).is_absolute() else argument)
        skips = argument in _PLACES
    return kept
