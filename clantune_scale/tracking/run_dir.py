"""A run's folder, never the same one twice, and the names of the rounds in it."""

from __future__ import annotations

import itertools
import re
import socket
import time
from pathlib import Path

from clantune_scale.config.schema import TrackingConfig
from clantune_scale.errors import ConfigError

#: The folder of a run that holds its committed rounds.
ROUNDS = "rounds"
_NAME = re.compile(r"round-(\d{6,})(?:-step-(\d{8,}))?")


def create_run_dir(config: TrackingConfig) -> Path:
    """Makes the folder of a new run and returns its absolute path. Only one process calls it.

    The folder is ``directory/run_name``, or ``directory/run_name-2`` and so on if that is taken. The date and time
    are the name if the config gives none.

    Raises:
        ConfigError: if the folder cannot be made.
    """
    name = config.run_name or time.strftime("%Y%m%d-%H%M%S")
    try:
        parent = Path(config.directory).resolve()
        parent.mkdir(parents=True, exist_ok=True)
        return _new_sibling(parent, name)
    # ValueError is what Python says of a null character in a path, RuntimeError of a loop of links.
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"the folder of this run, {name!r} in {config.directory!r} on {socket.gethostname()}, cannot be made: "
            f"{reason}. Set clantune.tracking.directory to a folder that rank 0 can write to, and "
            f"clantune.tracking.run_name to a name that its file system takes."
        ) from error


def _new_sibling(parent: Path, name: str) -> Path:
    for number in itertools.count(1):
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise AssertionError("unreachable: there is always a next number")


def round_name(index: int, step: int | None = None) -> str:
    """The folder's name for a finished round, or for one stopped after ``step`` optimizer steps of the run."""
    return f"round-{index:06d}" if step is None else f"round-{index:06d}-step-{step:08d}"


def committed_rounds(folder: Path) -> list[str]:
    """Names of the rounds in a run's ``rounds`` folder, newest first.

    A folder gets a round's name only once its files are complete, so ``LATEST`` is not needed to find it. A crash
    between the rename and the update of ``LATEST`` leaves a ``LATEST`` that names the round before.
    """
    found = [match for path in _children(folder) if (match := _NAME.fullmatch(path.name))]
    return [match.group(0) for match in sorted(found, key=_age, reverse=True)]


def _children(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _age(match: re.Match[str]) -> tuple[int, float]:
    # A state from inside a round is older than the round's end.
    return int(match.group(1)), float(match.group(2)) if match.group(2) else float("inf")
