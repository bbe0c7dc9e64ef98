"""What is known of a run from outside: the events file first, then MLflow and the terminal."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

from clantune_scale.config.schema import TrackingConfig
from clantune_scale.core.extras import is_installed, missing, remedy
from clantune_scale.tracking import uri as uris
from clantune_scale.tracking.background import Background, Event, EventConsumer
from clantune_scale.tracking.events import EventLog, read_events
from clantune_scale.tracking.lifecycle import FAILED, FINISHED, KILLED, Lifecycle
from clantune_scale.tracking.live import Steady, screen
from clantune_scale.tracking.run_dir import create_run_dir
from clantune_scale.tracking.sender import Sender
from clantune_scale.tracking.terminal import Terminal

logger = logging.getLogger(__name__)

__all__ = ["FAILED", "FINISHED", "KILLED", "Tracking", "create_run_dir", "read_events"]

# The launcher kills a process 30 s after SIGTERM; a run that ends by itself can wait for a slow server.
_DEADLINE_S = {FINISHED: 60.0, FAILED: 20.0, KILLED: 10.0}


class Tracking:
    """Takes a run's events; silent on every rank but the writer's.

    Use :meth:`open`. Whatever way the process ends, the run is closed with the right status.
    """

    def __init__(self) -> None:
        self._log: EventLog | None = None
        self._mlflow: Background | None = None
        self._screen: Steady | None = None
        self._terminal: Terminal | None = None
        self._lifecycle: Lifecycle | None = None
        self._run_dir = Path()
        self._mlflow_name = ""
        self._step = 0
        self._end: Event | None = None
        self._has_warned = self._has_told_of_disk = False

    @classmethod
    def open(cls, config: TrackingConfig, *, run_dir: Path, is_writer: bool, continues: bool = False) -> Tracking:
        """Starts tracking a run, or goes on.

        Args:
            config: the block's ``tracking`` part.
            run_dir: the run's own folder, from :func:`create_run_dir`.
            is_writer: true on exactly one rank of the whole clan.
            continues: whether an earlier launch of the run has written events; ``resume`` comes first then.

        Raises:
            ClanError: on every rank, if the config asks for MLflow in so many words and it is not installed.
        """
        uses_mlflow = _uses_mlflow(config, is_writer=is_writer)
        tracking = cls()
        if is_writer:
            tracking._start(config, run_dir, continues, uses_mlflow=uses_mlflow)
        return tracking

    @property
    def num_waiting(self) -> int:
        """Events that MLflow has not yet been sent."""
        return self._mlflow.num_waiting if self._mlflow is not None else 0

    @property
    def num_bytes(self) -> int:
        """Length of the events file; 0 where this rank writes none."""
        return self._log.num_bytes if self._log is not None else 0

    def emit(self, kind: str, step: int, **fields: Any) -> None:
        """Records an event.

        Args:
            kind: what happened; ``run_start`` comes first (in a launch that continues a run, ``resume``).
            step: optimizer steps completed.
            fields: what else is known, as plain data, dataclasses, pydantic models or numpy values.
        """
        if self._log is None:
            return
        self._step = step
        event = self._log.append(kind, step, fields)
        if self._mlflow is not None:
            self._mlflow.put(event)
        if kind == "run_end":
            # Shown by `close`, once it is known whether MLflow has everything.
            self._end = event
        elif self._terminal is not None:
            self._terminal.show(event)
        self._warn_of_mlflow()
        self._warn_of_disk(self._log)

    def say(self, line: str) -> None:
        """Prints a line; silent on every rank but the writer's."""
        if self._screen is not None:
            self._screen.line(line)

    def close(self, status: str = FINISHED) -> None:
        """Ends the run with ``FINISHED``, ``FAILED`` or ``KILLED``; harmless when it has ended.

        A ``run_end`` without a champion is emitted if none was.
        """
        log, lifecycle = self._log, self._lifecycle
        if log is None or lifecycle is None:
            return
        if self._end is None:
            self.emit("run_end", self._step, status=status, champion=None, champion_loss=None, artifacts={})
        if self._mlflow is not None:
            self._mlflow.close(deadline_s=_DEADLINE_S[status])
            self._warn_of_mlflow()
            if self._mlflow.is_late:
                logger.warning(
                    "clan: MLflow at %s has all events of this run. Its report and pictures follow, as long as this "
                    "host goes on; they are in %s too.",
                    self._mlflow_name,
                    self._run_dir,
                )
        self._log = None
        log.close()
        if log.num_waiting:
            logger.error(
                "clan: the last %d bytes of %s are lost: the disk did not take them.", log.num_waiting, log.path
            )
        lifecycle.release()
        if self._terminal is not None and self._end is not None:
            self._terminal.show(self._end)

    def suspend(self) -> None:
        """Sends what is queued, as a process does that is about to start again and go on with the run."""
        if self._mlflow is not None:
            self._mlflow.close(deadline_s=_DEADLINE_S[KILLED])

    def _start(self, config: TrackingConfig, run_dir: Path, continues: bool, *, uses_mlflow: bool) -> None:
        self._run_dir = run_dir
        self._log = EventLog(run_dir / "events.jsonl", continues=continues)
        hint = None
        if uses_mlflow:
            uri = uris.resolve(config.tracking_uri, directory=run_dir.parent)
            uris.set_client_defaults()
            self._mlflow_name = uris.redact(uri)
            hint = uris.hint(uri)
            self._mlflow = Background(lambda: _mlflow_recorder(uri, config, run_dir))
        self._screen = Steady(screen())
        self._terminal = Terminal(events_path=self._log.path, mlflow_hint=hint, on=self._screen)
        self._lifecycle = Lifecycle(self.close)

    def _warn_of_mlflow(self) -> None:
        if self._mlflow is None or self._mlflow.failure is None or self._has_warned:
            return
        self._has_warned = True
        records = "may lack the end of" if self._end is not None and self._mlflow.is_sent else "does not record"
        message = (
            f"MLflow at {self._mlflow_name} {records} this run ({self._mlflow.failure}); training goes on. "
            f"Upload it later: python -m clantune_scale.tracking.mlflow {shlex.quote(str(self._run_dir))}"
        )
        self.emit("warning", self._step, message=message)

    def _warn_of_disk(self, log: EventLog) -> None:
        """Once for each time that the disk fills up; not by an event alone, which would have to wait too."""
        if bool(log.num_waiting) != self._has_told_of_disk:
            self._has_told_of_disk = not self._has_told_of_disk
            if self._has_told_of_disk:
                logger.warning(
                    "clan: the disk of %s is full or does not answer. Events wait in memory and training goes on; "
                    "rounds are not written. Make room before the run ends.",
                    self._run_dir,
                )


def _uses_mlflow(config: TrackingConfig, *, is_writer: bool) -> bool:
    """Whether the run goes to MLflow. If MLflow is missing and only the default asks for it, the run goes without it.

    Raises:
        ClanError: if the config itself asks for it, by ``"mlflow": true`` or a ``tracking_uri``.
    """
    if not config.mlflow or is_installed("mlflow"):
        return config.mlflow
    asked = {"mlflow", "tracking_uri"} & config.model_fields_set
    if asked:
        raise missing("mlflow", needed_by=" and ".join(f'"tracking.{key}"' for key in sorted(asked)))
    if is_writer:
        logging.getLogger(__name__).warning(
            'MLflow is not installed, and this run is logged only to its events file. %s Or set "tracking.mlflow" to '
            "false to run without it.",
            remedy("mlflow"),
        )
    return False


def _mlflow_recorder(uri: str, config: TrackingConfig, run_dir: Path) -> EventConsumer:
    settings = {"uri": uri, "experiment": config.experiment, "run_dir": str(run_dir.resolve()), "is_live": True}
    return Sender({**settings, "system_metrics": config.system_metrics})
