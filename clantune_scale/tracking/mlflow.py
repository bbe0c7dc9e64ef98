"""Events as MLflow runs: one parent for the clan, one child per member; live, or later from the events file.

``python -m clantune_scale.tracking.mlflow RUN_DIR`` uploads a run that MLflow did not get while it trained.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clantune_scale.errors import ClanError
from clantune_scale.tracking import uri as uris
from clantune_scale.tracking.background import Event
from clantune_scale.tracking.events import read_events
from clantune_scale.tracking.lifecycle import KILLED

_MAX_PARAMS_PER_BATCH = 100
_MAX_PARAM_LENGTH = 6000
_UPLOADED_SUFFIXES = (".json", ".png")  # The weights stay where they are: a tag has their path.


class MlflowRecorder:
    """Writes events through :class:`mlflow.MlflowClient` with explicit run ids (``MLFLOW_RUN_ID`` changes nothing).

    Calls wait for the server: use it behind :class:`Background` while training.

    Args:
        uri: tracking URI.
        experiment: name of the experiment, made where it does not exist.
        run_dir: folder of the run; artifacts of a local store go beside it.
    """

    def __init__(self, uri: str, *, experiment: str, run_dir: Path) -> None:
        uris.set_client_defaults()
        from mlflow import MlflowClient

        # "Creating initial MLflow database tables...", in the middle of the user's terminal.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        self._client = MlflowClient(tracking_uri=uri)
        self._run_dir = run_dir
        self._experiment_id = self._find_or_create(experiment, uri)
        self._handlers = {
            "run_start": self._start,
            "step": self._step,
            "round_end": self._round,
            "warning": self._warn,
            "run_end": self._end,
        }
        self.parent: str | None = None
        self.children: list[str] = []

    def record(self, event: Event) -> None:
        """Sends one event; kinds that MLflow has no place for are left out."""
        handler = self._handlers.get(event["kind"])
        if handler is not None:
            handler(event)

    def _find_or_create(self, experiment: str, uri: str) -> str:
        found = self._client.get_experiment_by_name(experiment)
        if found is not None:
            return found.experiment_id
        # MLflow would put a local store's artifacts into the current folder.
        location = (self._run_dir.parent / "mlartifacts").resolve().as_uri() if uri.startswith("sqlite:") else None
        return self._client.create_experiment(experiment, artifact_location=location)

    def _start(self, event: Event) -> None:
        tags = {"clantune.run_id": event["run_id"], "clantune.run_dir": str(self._run_dir)}
        tags |= {f"version.{name}": version for name, version in event["versions"].items()}
        self.parent = self._create(event, event["name"], tags)
        settings = {key: event[key] for key in ("config", "topology", "batch", "total_steps", "resumed_from")}
        settings["gene"] = {gene["name"]: gene for gene in event["genes"]}
        self._log_params(self.parent, settings)
        for member, ranks in enumerate(event["member_ranks"]):
            tags = {"mlflow.parentRunId": self.parent, "clantune.member": member, "clantune.ranks": ranks}
            self.children.append(self._create(event, f"{event['name']}/member-{member}", tags))

    def _step(self, event: Event) -> None:
        self._log(self.parent, event, {f"train/{key}": event[key] for key in ("loss", "step_s", "samples")})

    def _round(self, event: Event) -> None:
        losses = [member["loss"] for member in event["members"] if math.isfinite(member["loss"])]
        clan = {f"seconds/{part}": seconds for part, seconds in event["seconds"].items()}
        clan |= {f"consensus/{gene}": value for gene, value in event["consensus"].items()}
        clan |= {"round": event["round"], "lr_factor": event["lr_factor"], "restored": event["restored"]}
        if losses:
            clan |= {"fitness/best": min(losses), "fitness/mean": sum(losses) / len(losses)}
        self._log(self.parent, event, clan)
        for member, rate in zip(event["members"], event["learning_rates"], strict=True):
            self._member(event, member, rate)

    def _member(self, event: Event, member: Mapping[str, Any], learning_rate: float) -> None:
        genome = member["genome"]
        metrics = {"fitness/loss": member["loss"], "fitness/standard_error": member["standard_error"]}
        metrics |= {f"gene/{name}": value for name, value in genome["values"].items()}
        metrics |= {f"step_size/{name}": value for name, value in genome["step_sizes"].items()}
        metrics |= {"lineage/donor": member["donor"], "learning_rate": learning_rate}
        tags = {"clantune.donor": member["donor"], "clantune.reason": member["reason"]}
        self._log(self.children[member["member"]], event, metrics, tags)

    def _warn(self, event: Event) -> None:
        if self.parent is not None:
            self._log(self.parent, event, {}, {"clantune.warning": event["message"]})

    def _end(self, event: Event) -> None:
        if self.parent is None:
            return
        tags = {f"clantune.artifact.{name}": path for name, path in event["artifacts"].items()}
        metrics = {}
        if event["champion"] is not None:
            tags["clantune.champion"] = event["champion"]
            metrics["champion_loss"] = event["champion_loss"]
        self._log(self.parent, event, metrics, tags)
        for path in map(Path, event["artifacts"].values()):
            if path.suffix in _UPLOADED_SUFFIXES and path.is_file():
                self._client.log_artifact(self.parent, str(path))
        for run in (*self.children, self.parent):
            self._client.set_terminated(run, status=event["status"], end_time=_milliseconds(event))

    def _create(self, event: Event, name: str, tags: Mapping[str, Any]) -> str:
        text = {key: str(value) for key, value in tags.items()}
        run = self._client.create_run(self._experiment_id, start_time=_milliseconds(event), tags=text, run_name=name)
        return run.info.run_id

    def _log(
        self, run: str | None, event: Event, metrics: Mapping[str, Any], tags: Mapping[str, Any] | None = None
    ) -> None:
        from mlflow.entities import Metric, RunTag

        if run is None:
            raise ClanError(f"the event {event['kind']!r} came before run_start. Emit run_start first.")
        time_ms = _milliseconds(event)
        self._client.log_batch(
            run,
            metrics=[Metric(key, _chartable(value), time_ms, event["step"]) for key, value in metrics.items()],
            tags=[RunTag(key, str(value)) for key, value in (tags or {}).items()],
            synchronous=True,
        )

    def _log_params(self, run: str, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)[:_MAX_PARAM_LENGTH]) for key, value in _flat(settings)]
        for start in range(0, len(params), _MAX_PARAMS_PER_BATCH):
            self._client.log_batch(run, params=params[start : start + _MAX_PARAMS_PER_BATCH], synchronous=True)


def upload(run_dir: Path, *, uri: str | None = None, experiment: str | None = None) -> str:
    """Replays a run's events into fresh MLflow runs; earlier uploads are left as they are.

    Args:
        run_dir: folder that holds ``events.jsonl``.
        uri: tracking URI; where None, the run's own, ``MLFLOW_TRACKING_URI`` or the local default.
        experiment: name of the experiment; the run's own where None.

    Returns:
        The id of the parent run.

    Raises:
        ClanError: if the file has no ``run_start``, or its URI had credentials, which are not stored.
    """
    run_dir = run_dir.resolve()
    events = read_events(run_dir / "events.jsonl")
    start = next((event for event in events if event["kind"] == "run_start"), None)
    if start is None:
        raise ClanError(f"{run_dir / 'events.jsonl'} has no run_start event: there is nothing to upload.")
    tracking = start["config"]["tracking"]
    uri = uri or uris.resolve(tracking["tracking_uri"], directory=run_dir.parent)
    if "***" in uri:
        raise ClanError(f"the run's tracking URI {uri} had credentials, which are not stored. Give --tracking-uri.")
    recorder = MlflowRecorder(uri, experiment=experiment or tracking["experiment"], run_dir=run_dir)
    for event in events:
        recorder.record(event)
    if not any(event["kind"] == "run_end" for event in events):
        # The process died without a word; its runs must not stay "running" for ever.
        recorder.record(events[-1] | {"kind": "run_end", "status": KILLED, "champion": None, "artifacts": {}})
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


def _chartable(value: float | None) -> float:
    # MLflow stores an infinity as 1.8e308, which flattens every chart that it is on.
    return float(value) if value is not None and math.isfinite(value) else math.nan


def _milliseconds(event: Event) -> int:
    return int(event["time_s"] * 1000)


if __name__ == "__main__":
    sys.exit(main())
