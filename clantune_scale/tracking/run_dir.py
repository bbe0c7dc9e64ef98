"""A folder for each run, and never the same one twice."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

from clantune_scale.config.schema import TrackingConfig


def create_run_dir(config: TrackingConfig) -> Path:
    """Makes the folder of a new run and returns its absolute path; one process does this.

    It is ``directory/run_name``, or ``directory/run_name-2`` and so on where that is taken; the name is
    the date and time where the config gives none.
    """
    name = config.run_name or time.strftime("%Y%m%d-%H%M%S")
    parent = Path(config.directory).resolve()
    parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = parent / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise AssertionError("unreachable: there is always a next number")
