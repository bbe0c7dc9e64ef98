"""A run's report, lineage and schedule as of now.

``python -m clantune_scale.tracking.snapshot RUN_DIR INTO [--background]``, in the background at the lowest priority.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from clantune_scale.core.extras import is_installed
from clantune_scale.errors import ClanError
from clantune_scale.tracking.events import iter_events, read_events
from clantune_scale.tracking.history import lineage_from_events, schedule_from_events
from clantune_scale.tracking.report import write_report

# As objects, events take some ten times the memory that they take as text, and training needs it more. The report
# reads one event at a time; lineage and schedule of a run this long come from the run itself, at its end.
_MAX_BYTES = 64 * 2**20


def snapshot(run_dir: Path, into: Path) -> None:
    """Writes the report into the run's folder, ``lineage.json`` and ``schedule.json`` into another.

    A run without a finished round has none of them yet, which is no error. Without matplotlib there is no report.

    Args:
        run_dir: folder of the run, which may be going.
        into: an existing folder.
    """
    path = run_dir / "events.jsonl"
    if not any(event["kind"] == "round_end" for event in iter_events(path)):
        return
    if path.stat().st_size <= _MAX_BYTES:
        _lineage_and_schedule(path, into)
    if is_installed("matplotlib"):
        write_report(run_dir)


def _lineage_and_schedule(path: Path, into: Path) -> None:
    events = read_events(path)
    (into / "lineage.json").write_text(json.dumps(lineage_from_events(events).to_json()))
    try:
        (into / "schedule.json").write_text(schedule_from_events(events).to_json())
    except ClanError as error:
        # No member with a finite loss: there is no schedule to speak of, and everything else is still wanted.
        print(error, file=sys.stderr)


if __name__ == "__main__":
    if "--background" in sys.argv[3:]:
        os.nice(19)
    snapshot(Path(sys.argv[1]), Path(sys.argv[2]))
