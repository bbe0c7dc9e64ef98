"""Files in MLflow while a run goes on: fresh, seldom, and never at the metrics' expense."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest

from clantune_scale.tracking import artifacts as refreshing
from clantune_scale.tracking.artifacts import Artifacts
from clantune_scale.tracking.mlflow import MlflowRecorder
from tests.tracking import simulated_run


class Client:
    """Takes files as MlflowClient does, or refuses them all."""

    def __init__(self, refuses=False):
        self.refuses = refuses
        self.files, self.tags = {}, {}

    def log_artifact(self, run, path, folder=None):
        if self.refuses:
            raise OSError("the bucket is not there")
        with open(path, "rb") as file:
            self.files["/".join(filter(None, (folder, path.rsplit("/", 1)[1])))] = file.read()

    def set_tag(self, run, key, value):
        self.tags[key] = value


def test_a_run_that_goes_on_has_lineage_schedule_and_report(tmp_path):
    simulated_run.write(tmp_path, num_rounds=3, num_members=4)
    client = Client()
    Artifacts(client, "run", tmp_path).finish()
    assert {"events.jsonl", "lineage.json", "schedule.json", "report.html", "figures/family.png"} <= set(client.files)
    assert len(json.loads(client.files["lineage.json"])["rounds"]) == 3
    # What the run writes at its end is not anticipated in its own folder.
    assert not (tmp_path / "lineage.json").exists() and not (tmp_path / "schedule.json").exists()


def test_the_runs_own_files_come_first(tmp_path):
    simulated_run.write(tmp_path, num_rounds=1, num_members=4)
    (tmp_path / "schedule.json").write_text("the run's own")
    client = Client()
    Artifacts(client, "run", tmp_path).finish()
    assert client.files["schedule.json"] == b"the run's own"


def test_before_the_first_round_there_are_events_alone(tmp_path):
    simulated_run.write(tmp_path, num_rounds=0, num_members=4)
    client = Client()
    Artifacts(client, "run", tmp_path).finish()
    assert set(client.files) == {"events.jsonl"} and not client.tags


class Snapshot:
    """A process that takes ten seconds of a clock that the test sets, or for ever."""

    clock = 1000.0
    lasts = 10.0
    begun: ClassVar[list[Snapshot]] = []

    def __init__(self, run_dir, *, in_background):
        self.began_s, self.in_background, self.folder = Snapshot.clock, in_background, run_dir
        self.closed = self.waited = False
        Snapshot.begun.append(self)

    @property
    def is_over(self):
        return Snapshot.clock >= self.began_s + self.lasts

    def wait(self, limit_s):
        self.waited = True

    def check(self):
        assert self.is_over or self.waited

    def close(self):
        self.closed = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


@pytest.fixture
def snapshots(monkeypatch):
    monkeypatch.setattr(refreshing, "_Snapshot", Snapshot)
    monkeypatch.setattr(refreshing.time, "monotonic", lambda: Snapshot.clock)
    monkeypatch.setattr(Snapshot, "clock", 1000.0)
    monkeypatch.setattr(Snapshot, "begun", [])
    return Snapshot


def test_at_most_a_twentieth_of_the_time(tmp_path, snapshots):
    files = Artifacts(Client(), "run", tmp_path)
    for second in range(1000, 1400, 5):
        snapshots.clock = float(second)
        files.refresh_if_due()
    # The first after half a minute, the next when ten seconds are a twentieth of the time since.
    assert [one.began_s for one in snapshots.begun] == [1030, 1240]
    assert all(one.in_background and one.closed for one in snapshots.begun)


def test_a_refresh_that_is_late_is_left_out_and_waited_for_by_nobody(tmp_path, snapshots, monkeypatch):
    monkeypatch.setattr(snapshots, "lasts", float("inf"))
    client = Client()
    files = Artifacts(client, "run", tmp_path)
    (tmp_path / "events.jsonl").write_text("{}")
    for second in (1030.0, 1100.0, 1700.0, 1701.0):
        snapshots.clock = second
        files.refresh_if_due()
    first, second = snapshots.begun
    assert first.closed and not first.waited and not client.files and (second.began_s, second.closed) == (1701, False)
    files.finish()
    # The end does not wait for what runs when nobody else does. It makes its own, and not in the background.
    (*_, last) = snapshots.begun
    assert second.closed and not second.waited and last.waited and last.closed and not last.in_background
    assert set(client.files) == {"events.jsonl"} and not client.tags


def test_a_store_that_fails_is_told_once_and_kept_as_a_tag(tmp_path, caplog):
    simulated_run.write(tmp_path, num_rounds=0, num_members=4)
    client = Client(refuses=True)
    files = Artifacts(client, "run", tmp_path)
    files.finish()
    files.finish()
    assert client.tags["clantune.artifacts_error"] == "OSError: the bucket is not there"
    assert [record.message for record in caplog.records] == [
        "MLflow does not have all files of this run: OSError: the bucket is not there"
    ]


@pytest.mark.slow
def test_a_live_run_is_refreshed_as_it_goes_and_monitored_at_its_own_steps(tmp_path, monkeypatch):
    """Through the recorder, into a database: files are there before the end, system metrics carry optimizer steps."""
    from mlflow import MlflowClient

    monkeypatch.setattr(refreshing, "_LEAST_S", 0.0)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    run_dir = simulated_run.write(tmp_path / "run", num_rounds=2, num_members=4)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    recorder = MlflowRecorder(uri, experiment="clantune", run_dir=run_dir, is_live=True, system_metrics=True)
    for event in simulated_run.events(num_rounds=2, num_members=4):
        recorder.record(event)
    client = MlflowClient(tracking_uri=uri)
    recorder._artifacts._going.wait(100)
    recorder._artifacts.refresh_if_due()
    assert "report.html" in {artifact.path for artifact in client.list_artifacts(recorder.parent)}
    recorder.record(
        {"kind": "run_end", "time_s": 41.0, "step": 40, "status": "FINISHED", "champion": 0}
        | {"champion_loss": 1.0, "artifacts": {}}
    )
    metrics = client.get_run(recorder.parent).data.metrics
    (system, *_) = [name for name in metrics if name.startswith("system/cpu_utilization")]
    steps = {metric.step for metric in client.get_metric_history(recorder.parent, system)}
    assert steps and steps <= {0, 20, 40}


@pytest.mark.parametrize("is_live", [True, False])
def test_an_upload_monitors_nothing(tmp_path, monkeypatch, is_live):
    started = []
    monkeypatch.setattr("clantune_scale.tracking.mlflow._start_monitor", lambda run, **_: started.append(run))
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    recorder = MlflowRecorder(uri, experiment="clantune", run_dir=tmp_path, is_live=is_live, system_metrics=True)
    recorder.record(simulated_run.start(num_rounds=1, num_members=4))
    assert started == ([recorder.parent] if is_live else [])
