"""A run's files in MLflow. They are refreshed while the run goes on, in a small share of its time.

A process of its own, at the lowest priority, draws the report: that takes seconds of processor time.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

_FILES = ("events.jsonl", "run.json", "lineage.json", "schedule.json", "genes.png", "report.html")
_LEAST_S = 30.0
_SHARE = 0.05
_MAX_S = 600.0


class Artifacts:
    """Uploads a run's events, lineage, schedule, pictures and report.

    If the store refuses them, the run and its metrics go on. The error is logged once, and is the value of the tag
    ``clantune.artifacts_error``.

    Args:
        client: of the server.
        run: id of the MLflow run that gets them.
        run_dir: the run's folder.
    """

    def __init__(self, client: MlflowClient, run: str, run_dir: Path) -> None:
        self._client, self._run, self._run_dir = client, run, run_dir
        self._not_before = time.monotonic() + _LEAST_S
        self._has_complained = False

    def refresh_if_due(self) -> None:
        """Uploads what there is, unless the last upload ended less than 30 s, or 20 times its own duration, ago."""
        if time.monotonic() >= self._not_before:
            self.refresh()

    def refresh(self) -> None:
        """Uploads what there is."""
        began = time.monotonic()
        try:
            with tempfile.TemporaryDirectory(prefix="clantune-") as scratch:
                self._make(Path(scratch))
                self._upload(Path(scratch))
        # Each kind of artifact store fails in its own ways, and metrics must go on.
        except Exception as error:
            self._complain(error)
        now = time.monotonic()
        self._not_before = now + max(_LEAST_S, (now - began) / _SHARE)

    def _make(self, scratch: Path) -> None:
        """Writes the report into the run's folder, and into ``scratch`` what the run itself writes only at its end."""
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "clantune_scale.tracking.snapshot", str(self._run_dir), str(scratch)]
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_MAX_S)
        if done.returncode != 0:
            raise RuntimeError(f"the report was not made: {done.stderr.strip()[-500:]}")

    def _upload(self, scratch: Path) -> None:
        for name in _FILES:
            # A file that the finished run has written itself is preferred.
            path = next((place / name for place in (self._run_dir, scratch) if (place / name).is_file()), None)
            if path is not None:
                self._client.log_artifact(self._run, str(path))
        for picture in sorted((self._run_dir / "figures").glob("*.png")):
            self._client.log_artifact(self._run, str(picture), "figures")

    def _complain(self, error: Exception) -> None:
        message = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        self._client.set_tag(self._run, "clantune.artifacts_error", message)
        if not self._has_complained:
            logging.getLogger(__name__).warning("MLflow does not have all files of this run: %s", message)
        self._has_complained = True
