"""A run's files in MLflow. They are refreshed while the run goes on, in a small share of its time.

A process of its own draws the report: that takes seconds of processor time. While the run goes on, the process has the
lowest priority and nobody waits for it; a report that is late is uploaded later, or left out. At the end it is waited
for, and has the priority of the run.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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
        self._going: _Snapshot | None = None

    def refresh_if_due(self) -> None:
        """Begins a refresh if one is due, or uploads what the last one has made; returns at once.

        A refresh is due 30 s, or 20 times its own duration, after the last one has ended.
        """
        now = time.monotonic()
        if self._going is not None and self._going.is_over:
            self._take(self._going)
            now = time.monotonic()
            self._not_before = now + max(_LEAST_S, (now - self._going.began_s) / _SHARE)
            self._going = None
        elif self._going is not None and now - self._going.began_s > _MAX_S:
            self._leave_out()
        elif self._going is None and now >= self._not_before:
            self._going = _Snapshot(self._run_dir, in_background=True)

    def finish(self) -> None:
        """Uploads the files of a run that has ended: first what there is, then what has to be made."""
        self._leave_out()
        self._attempt(lambda: self._upload(self._run_dir, self._run_dir))
        last = _Snapshot(self._run_dir, in_background=False)
        try:
            last.wait(_MAX_S)
            self._take(last)
        except subprocess.TimeoutExpired as late:
            last.close()
            self._complain(late)

    def _take(self, snapshot: _Snapshot) -> None:
        with snapshot:
            self._attempt(snapshot.check)
            self._attempt(lambda: self._upload(self._run_dir, snapshot.folder))

    def _leave_out(self) -> None:
        if self._going is not None:
            self._going.close()
            self._going = None

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        # Each kind of artifact store fails in its own ways, and metrics must go on.
        except Exception as error:
            self._complain(error)

    def _upload(self, *places: Path) -> None:
        for name in _FILES:
            # A file that the finished run has written itself is preferred.
            path = next((place / name for place in places if (place / name).is_file()), None)
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


class _Snapshot:
    """A process that makes the report in the run's folder, and in ``folder`` what the run itself writes at its end.

    Args:
        run_dir: the run's folder.
        in_background: whether it gets only the time that nobody else wants.
    """

    def __init__(self, run_dir: Path, *, in_background: bool) -> None:
        self.began_s = time.monotonic()
        self._scratch = tempfile.TemporaryDirectory(prefix="clantune-", ignore_cleanup_errors=True)
        self.folder = Path(self._scratch.name)
        self._said = self.folder / "said"
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "clantune_scale.tracking.snapshot", str(run_dir), str(self.folder)]
        with open(self._said, "w") as said:
            self._process = subprocess.Popen(
                command + ["--background"] * in_background,
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
            )

    @property
    def is_over(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def wait(self, limit_s: float) -> None:
        """Waits for its end; raises ``subprocess.TimeoutExpired`` after ``limit_s`` seconds."""
        self._process.wait(limit_s)

    def check(self) -> None:
        """Raises RuntimeError, with its last words, if the process has failed."""
        if self._process.returncode != 0:
            raise RuntimeError(f"the report was not made: {self._said.read_text().strip()[-500:]}")

    def close(self) -> None:
        """Ends the process if it goes on, and removes what it made."""
        if not self.is_over:
            self._process.kill()
            self._process.wait()
        self._scratch.cleanup()

    def __enter__(self) -> _Snapshot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
