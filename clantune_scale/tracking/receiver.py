"""The process at the other end of a :class:`clantune_scale.tracking.sender.Sender`.

The sender starts it as ``python -m clantune_scale.tracking.receiver``.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from clantune_scale.tracking.background import RECORDED, in_short
from clantune_scale.tracking.lifecycle import KILLED
from clantune_scale.tracking.mlflow import MlflowRecorder


def receive(lines: Iterable[bytes]) -> None:
    """Records events until there are no more.

    Args:
        lines: the recorder's arguments as a JSON object, then one event each.
    """
    waiting = iter(lines)
    settings = json.loads(next(waiting))
    recorder = MlflowRecorder(settings.pop("uri"), **{**settings, "run_dir": Path(settings["run_dir"])})
    last = None
    for line in waiting:
        last = json.loads(line)
        recorder.record(last)
    if last is not None and last["kind"] != "run_end":
        # The sender was killed before it could send the end. Its MLflow runs must not stay "running" for ever.
        recorder.record({**last, "kind": "run_end", "status": KILLED, "champion": None, "artifacts": {}})
    # The sender waits for this. Files take longer, and it may be gone by then.
    with suppress(BrokenPipeError):
        print(RECORDED, flush=True)
    recorder.close()


if __name__ == "__main__":
    # A launcher that ends a node, and Ctrl-C, signal every process. This one ends when it has no more to send.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    try:
        receive(sys.stdin.buffer)
    # Whatever a tracking server or its client raises becomes a line for the process that trains.
    except Exception as error:
        print(in_short(error), flush=True)
        sys.exit(1)
