"""Events as MLflow runs: one parent for the clan, one child per member; live, or later from the events file.

``python -m clantune_scale.tracking.mlflow RUN_DIR`` uploads a run that MLflow did not get while it trained.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from clantune_scale.core.extras import require
from clantune_scale.errors import ClanError
from clantune_scale.tracking import metrics
from clantune_scale.tracking import uri as uris
from clantune_scale.tracking.artifacts import Artifacts
from clantune_scale.tracking.background import Event
from clantune_scale.tracking.events import iter_events, read_events
from clantune_scale.tracking.lifecycle import KILLED
from clantune_scale.tracking.mlflow_names import allowed
from clantune_scale.tracking.one_at_a_time import one_at_a_time

_MAX_PARAMS_PER_BATCH = 100
_MAX_PARAM_LENGTH = 6000
# With this tag MLflow's pages open on runs and charts, and not on traces of language model applications.
_KIND = {"mlflow.experimentKind": "custom_model_development"}
# A file in the run's folder. It names the MLflow runs of this run, and their store.
_IDS = "mlflow.json"
_SETTINGS = ("config", "topology", "batch", "total_steps", "resumed_from", "start_genome", "tokens_per_sample")


class MlflowRecorder:
    """Writes events through :class:`mlflow.MlflowClient` with explicit run ids. ``MLFLOW_RUN_ID`` changes nothing.

    Calls wait for the server. Use it behind :class:`Background` while training.

    Args:
        uri: tracking URI.
        experiment: name of the experiment; it is made if it does not exist.
        run_dir: folder of the run; artifacts of a local store go beside it.
        is_live: whether the run is still training. Its files are then refreshed meanwhile, and not only at its end.
        system_metrics: whether this host is monitored while the run trains.

    Raises:
        ClanError: if MLflow is not installed.
    """

    def __init__(
        self, uri: str, *, experiment: str, run_dir: Path, is_live: bool = False, system_metrics: bool = False
    ) -> None:
        require("mlflow", needed_by="a record of the run in MLflow")
        uris.set_client_defaults()
        from mlflow import MlflowClient

        # It would print "Creating initial MLflow database tables..." in the middle of the user's terminal.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        self._run_dir = run_dir
        # The first call to a database makes its tables, and MLflow lets two processes do it at once: one of them fails.
        with one_at_a_time(uris.local_file(uri)):
            self._client = MlflowClient(tracking_uri=uri)
            self._experiment_id = self._find_or_create(experiment, uri)
        self._handlers = {
            "run_start": self._start,
            "resume": self._resume,
            "phase_start": self._phase,
            "step": self._step,
            "round_end": self._round,
            "warning": self._warn,
            "member_lost": self._lost,
            "run_end": self._end,
        }
        self._uri = uri
        self._is_live, self._monitors_system = is_live, is_live and system_metrics
        self._artifacts: Artifacts | None = None
        self._monitor: Any = None
        self._step_now = 0
        self.parent: str | None = None
        self.children: list[str] = []

    def record(self, event: Event) -> None:
        """Sends one event. Kinds for which MLflow has no place are left out."""
        self._step_now = event["step"]
        handler = self._handlers.get(event["kind"])
        if handler is not None:
            handler(event)

    def _find_or_create(self, experiment: str, uri: str) -> str:
        found = self._client.get_experiment_by_name(experiment)
        if found is not None:
            return found.experiment_id
        # MLflow would put a local store's artifacts into the current folder.
        location = (self._run_dir.parent / "mlartifacts").resolve().as_uri() if uri.startswith("sqlite:") else None
        try:
            return self._client.create_experiment(experiment, artifact_location=location, tags=_KIND)
        except Exception:
            # Another run may have made it meanwhile, on a server that all hosts share.
            found = self._client.get_experiment_by_name(experiment)
            if found is None:
                raise
            return found.experiment_id

    def _start(self, event: Event) -> None:
        tags = {"clantune.run_id": event["run_id"], "clantune.run_dir": str(self._run_dir)}
        tags |= {f"version.{name}": version for name, version in event["versions"].items()}
        tags |= {f"hardware.{name}": value for name, value in (event.get("hardware") or {}).items()}
        if event.get("command"):
            tags["clantune.command"] = event["command"]
        self.parent = self._create(event, event["name"], tags)
        settings = {key: event[key] for key in _SETTINGS if key in event}
        settings["gene"] = {gene["name"]: gene for gene in event["genes"]}
        self._log_params(self.parent, settings)
        for member, ranks in enumerate(event["member_ranks"]):
            tags = {"mlflow.parentRunId": self.parent, "clantune.member": member, "clantune.ranks": ranks}
            self.children.append(self._create(event, f"{event['name']}/member-{member}", tags))
        self._remember_ids()
        self._accompany()

    def _accompany(self) -> None:
        """Starts what goes along with the parent run: its files, and the monitor of the host."""
        assert self.parent is not None
        self._artifacts = Artifacts(self._client, self.parent, self._run_dir)
        if self._monitors_system:
            self._monitor = _start_monitor(self.parent, uri=self._uri, step=lambda: self._step_now)

    def _resume(self, event: Event) -> None:
        """Continues the MLflow runs of the previous launch. If this store has none, makes them from the events file."""
        ids = self._known_ids()
        if self.parent is None and ids is not None:
            self.parent, self.children = ids["parent"], list(ids["children"])
            for run in (self.parent, *self.children):
                self._client.update_run(run, status="RUNNING")
            self._accompany()
        elif self.parent is None:
            for earlier in iter_events(self._run_dir / "events.jsonl"):
                if earlier["kind"] == "resume" and earlier["time_s"] >= event["time_s"]:
                    break
                self.record(earlier)
        for member in range(len(self.children), event.get("population_size", 0)):
            tags = {"mlflow.parentRunId": self.parent, "clantune.member": member}
            self.children.append(self._create(event, f"{event['name']}/member-{member}", tags))
        self._remember_ids()
        self._log(self.parent, event, {}, {"clantune.resumed_from": event["resumed_from"]})

    def _remember_ids(self) -> None:
        if self._is_live:
            ids = {"uri": uris.redact(self._uri), "parent": self.parent, "children": self.children}
            (self._run_dir / _IDS).write_text(json.dumps(ids))

    def _known_ids(self) -> dict[str, Any] | None:
        """The ids that the first launch wrote down; None if they belong to another store."""
        path = self._run_dir / _IDS
        if not (self._is_live and path.exists()):
            return None
        ids = json.loads(path.read_text())
        return ids if ids["uri"] == uris.redact(self._uri) else None

    def _step(self, event: Event) -> None:
        self._log(self.parent, event, metrics.of_step(event))

    def _phase(self, event: Event) -> None:
        self._log(self.parent, event, metrics.of_phase(event))

    def _round(self, event: Event) -> None:
        self._log(self.parent, event, metrics.of_round(event))
        for member, rate in zip(event["members"], event["learning_rates"], strict=True):
            tags = {"clantune.donor": member["donor"], "clantune.reason": member["reason"]}
            self._log(self.children[member["member"]], event, metrics.of_member(event, member, rate), tags)
        if self._is_live and self._artifacts is not None:
            self._artifacts.refresh_if_due()

    def _warn(self, event: Event) -> None:
        if self.parent is not None:
            self._log(self.parent, event, {}, {"clantune.warning": event["message"]})

    def _lost(self, event: Event) -> None:
        if self.parent is not None:
            tags = {"clantune.generation": str(event["generation"]), "clantune.members_left": str(event["left"])}
            self._log(self.parent, event, {}, tags)

    def _end(self, event: Event) -> None:
        if self.parent is None or self._artifacts is None:
            return
        if self._monitor is not None:
            self._monitor.finish()
        tags = {f"clantune.artifact.{name}": path for name, path in event["artifacts"].items()}
        found = {}
        if event["champion"] is not None:
            tags["clantune.champion"] = event["champion"]
            found["champion_loss"] = event["champion_loss"]
        self._log(self.parent, event, found, tags)
        # The files come after the status, in `close`. A process that is being killed may not get as far.
        for run in (*self.children, self.parent):
            self._client.set_terminated(run, status=event["status"], end_time=_milliseconds(event))

    def close(self) -> None:
        """Uploads the run's files, after its last event. Whoever waits for the events need not wait for this."""
        if self._artifacts is not None:
            self._artifacts.finish()

    def _create(self, event: Event, name: str, tags: Mapping[str, Any]) -> str:
        text = {key: str(value) for key, value in tags.items()}
        run = self._client.create_run(self._experiment_id, start_time=_milliseconds(event), tags=text, run_name=name)
        return run.info.run_id

    def _log(
        self, run: str | None, event: Event, values: Mapping[str, Any], tags: Mapping[str, Any] | None = None
    ) -> None:
        from mlflow.entities import Metric, RunTag

        if run is None:
            raise ClanError(f"the event {event['kind']!r} came before run_start. Emit run_start first.")
        time_ms = _milliseconds(event)
        self._client.log_batch(
            run,
            metrics=[
                Metric(allowed(name), metrics.chartable(of), time_ms, event["step"]) for name, of in values.items()
            ],
            tags=[RunTag(key, str(value)) for key, value in (tags or {}).items()],
            synchronous=True,
        )

    def _log_params(self, run: str, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(allowed(key), str(value)[:_MAX_PARAM_LENGTH]) for key, value in _flat(settings)]
        for start in range(0, len(params), _MAX_PARAMS_PER_BATCH):
            self._client.log_batch(run, params=params[start : start + _MAX_PARAMS_PER_BATCH], synchronous=True)


def _start_monitor(run: str, *, uri: str, step: Callable[[], int]) -> Any:
    """Starts MLflow's ``SystemMetricsMonitor`` on a separate thread. It watches this host until ``finish()``.

    MLflow's environment variables (``MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL`` and others) say how often it samples.
    GPUs need the package ``nvidia-ml-py``. Without it they are left out.

    Args:
        run: id of the MLflow run that gets the metrics.
        uri: tracking URI.
        step: gives the run's optimizer step, which is the step of every other metric too.

    Returns:
        The monitor.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    # It would print "Started monitoring system metrics." in the middle of the user's terminal.
    logging.getLogger("mlflow.system_metrics.system_metrics_monitor").setLevel(logging.WARNING)

    class Monitor(SystemMetricsMonitor):
        def publish_metrics(self, metrics: dict[str, float]) -> None:
            self._logging_step = step()
            super().publish_metrics(metrics)

    monitor = Monitor(run, tracking_uri=uri)
    monitor.start()
    return monitor


def upload(run_dir: Path, *, uri: str | None = None, experiment: str | None = None) -> str:
    """Replays a run's events into new MLflow runs. Earlier uploads stay as they are.

    Args:
        run_dir: folder that holds ``events.jsonl``.
        uri: tracking URI; if None, the run's own, ``MLFLOW_TRACKING_URI`` or the local default.
        experiment: name of the experiment; the run's own if None.

    Returns:
        The id of the parent run.

    Raises:
        ClanError: if the file has no ``run_start``, if its URI had credentials (they are not stored), or if MLflow is
            not installed.
    """
    run_dir = run_dir.resolve()
    events = read_events(run_dir / "events.jsonl")
    start = next((event for event in events if event["kind"] == "run_start"), None)
    if start is None:
        raise ClanError(
            f"{run_dir / 'events.jsonl'} has no run_start event. Give the folder of a run that has started."
        )
    tracking = start["config"]["tracking"]
    uri = uri or uris.resolve(tracking["tracking_uri"], directory=run_dir.parent)
    if "***" in uri:
        raise ClanError(f"the run's tracking URI {uri} had credentials, which are not stored. Give --tracking-uri.")
    recorder = MlflowRecorder(uri, experiment=experiment or tracking["experiment"], run_dir=run_dir)
    for event in events:
        recorder.record(event)
    if not any(event["kind"] == "run_end" for event in events):
        # The process was killed before it could write its end. Its MLflow runs must not stay "running" for ever.
        recorder.record(events[-1] | {"kind": "run_end", "status": KILLED, "champion": None, "artifacts": {}})
    recorder.close()
    assert recorder.parent is not None
    return recorder.parent


def main(arguments: list[str] | None = None) -> int:
    """The command line of :func:`upload`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m clantune_scale.tracking.mlflow", description="Uploads a run from its events file to MLflow."
    )
    parser.add_argument("run_dir", type=Path, help="folder of the run, which holds events.jsonl")
    parser.add_argument("--tracking-uri", default=None, help="where to upload to, instead of the run's own")
    parser.add_argument("--experiment", default=None, help="experiment, instead of the run's own")
    given = parser.parse_args(arguments)
    try:
        parent = upload(given.run_dir, uri=given.tracking_uri, experiment=given.experiment)
    except ClanError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"uploaded {given.run_dir} as run {parent}")
    return 0


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _milliseconds(event: Event) -> int:
    return int(event["time_s"] * 1000)


if __name__ == "__main__":
    sys.exit(main())
