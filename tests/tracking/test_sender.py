"""MLflow behind a pipe: everything arrives, whatever happens to the process that trains."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from clantune_scale.errors import RecordingStopped
from clantune_scale.tracking.sender import Sender
from tests.tracking import simulated_run


def settings(tmp_path, uri=None):
    (tmp_path / "run").mkdir(exist_ok=True)
    uri = uri or f"sqlite:///{tmp_path / 'mlflow.db'}"
    return {"uri": uri, "experiment": "clantune", "run_dir": str(tmp_path / "run"), "is_live": False}


def runs_in(tmp_path):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("clantune")
    return client.search_runs([experiment.experiment_id]) if experiment else []


def test_events_arrive_also_those_that_are_not_finite(tmp_path):
    sender = Sender(settings(tmp_path))
    for event in simulated_run.events(num_rounds=1, num_members=4):
        if event["kind"] == "step":
            event["loss"] = float("nan")
        sender.record(event)
    end = {"kind": "run_end", "time_s": 1.8e9, "step": 20, "status": "FAILED", "champion": None, "artifacts": {}}
    sender.record(end)
    sender.close()
    runs = runs_in(tmp_path)
    assert len(runs) == 5 and {run.info.status for run in runs} == {"FAILED"}


def test_what_goes_wrong_there_is_said_here(tmp_path):
    sender = Sender(settings(tmp_path, uri="nonsense://host"))
    with pytest.raises(RecordingStopped, match=r"nonsense"):
        for _ in range(600):
            sender.record({"kind": "other", "step": 0})
            time.sleep(0.1)


def test_a_sender_that_is_killed_leaves_no_run_running(tmp_path):
    body = f"""
        import time
        from clantune_scale.tracking.sender import Sender
        from tests.tracking import simulated_run
        sender = Sender({settings(tmp_path)!r})
        for event in simulated_run.events(num_rounds=1, num_members=4):
            sender.record(event)
        print(flush=True)
        time.sleep(60)
    """
    # Two processes that make the same database at once fail: it is made before.
    assert runs_in(tmp_path) == []
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(body)], stdout=subprocess.PIPE)
    process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and {run.info.status for run in runs_in(tmp_path)} != {"KILLED"}:
        time.sleep(0.5)
    assert [run.info.status for run in runs_in(tmp_path)] == ["KILLED"] * 5
