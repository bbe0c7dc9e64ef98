"""The whole of tracking behind its three methods."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from clantune_scale.checkpoint import opening
from clantune_scale.config.schema import ClanConfig, TrackingConfig
from clantune_scale.errors import ConfigError
from clantune_scale.tracking import Tracking, create_run_dir, read_events
from clantune_scale.tracking.mlflow import upload
from tests.tracking import sample_run


def clan_config(tmp_path, **tracking) -> ClanConfig:
    settings = {"directory": str(tmp_path / "runs"), "run_name": "sample", **tracking}
    return ClanConfig(population_size=2, tracking=settings)


def run_sample(config: ClanConfig, status: str = "FINISHED") -> Path:
    run_dir = create_run_dir(config.tracking)
    tracking = Tracking.open(config.tracking, run_dir=run_dir, is_writer=True)
    sample_run.emit_all(tracking, config)
    tracking.close(status)
    return run_dir


@pytest.fixture(autouse=True)
def no_uri_of_the_environment(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_a_used_directory_is_never_used_again(tmp_path):
    config = TrackingConfig(directory=str(tmp_path), run_name="mine")
    assert [create_run_dir(config).name for _ in range(3)] == ["mine", "mine-2", "mine-3"]


def test_a_run_without_a_name_has_one(tmp_path):
    first, second = (create_run_dir(TrackingConfig(directory=str(tmp_path))) for _ in range(2))
    assert first.is_dir() and second.is_dir() and first != second


def test_ranks_that_do_not_write_are_silent(tmp_path, capsys):
    config = clan_config(tmp_path)
    hook = sys.excepthook
    tracking = Tracking.open(config.tracking, run_dir=tmp_path, is_writer=False)
    sample_run.emit_all(tracking, config)
    tracking.close()
    assert sys.excepthook is hook and not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


def test_without_mlflow_there_are_events_and_lines(tmp_path, capsys):
    run_dir = run_sample(clan_config(tmp_path, mlflow=False))
    kinds = [event["kind"] for event in read_events(run_dir / "events.jsonl")]
    assert kinds == ["run_start", "step", "round_end", "step", "round_end", "run_end"]
    out = capsys.readouterr().out
    assert "round 1: steps 10 to 20" in out and "clan FINISHED after 20 steps" in out and "mlflow ui" not in out
    assert not (tmp_path / "runs" / "mlflow.db").exists()


def test_the_default_is_a_database_beside_the_runs(tmp_path, capsys, monkeypatch):
    from mlflow import MlflowClient

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run_sample(clan_config(tmp_path), status="FAILED")
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("clantune")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 3 and {run.info.status for run in runs} == {"FAILED"}
    printed = capsys.readouterr()
    assert "mlflow ui --backend-store-uri sqlite:////" in printed.out
    assert "Creating initial MLflow database" not in printed.err
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_server_that_is_down_costs_one_warning_and_the_spool_uploads_later(tmp_path, capsys, caplog):
    from mlflow import MlflowClient

    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = f"http://user:hunter2@127.0.0.1:{closed.getsockname()[1]}"
    run_dir = run_sample(clan_config(tmp_path, tracking_uri=uri))
    printed = capsys.readouterr()
    assert caplog.text.count("clan warning: MLflow at http://***@127.0.0.1") == 1
    assert f"python -m clantune_scale.tracking.mlflow {run_dir}" in caplog.text
    events = read_events(run_dir / "events.jsonl")
    assert [event["kind"] for event in events].count("warning") == 1
    assert "hunter2" not in printed.out + printed.err + caplog.text + (run_dir / "events.jsonl").read_text()
    later = f"sqlite:///{tmp_path / 'later.db'}"
    run = MlflowClient(tracking_uri=later).get_run(upload(run_dir, uri=later))
    assert run.info.status == "FINISHED" and run.data.metrics["fitness/best"] == 2.0


def test_close_twice_is_one_end(tmp_path):
    config = clan_config(tmp_path, mlflow=False)
    run_dir = create_run_dir(config.tracking)
    tracking = Tracking.open(config.tracking, run_dir=run_dir, is_writer=True)
    tracking.emit("run_end", 5, status="FINISHED", champion=None, champion_loss=None, artifacts={})
    tracking.close()
    tracking.close("FAILED")
    assert [event["status"] for event in read_events(run_dir / "events.jsonl")] == ["FINISHED"]


@pytest.mark.parametrize(("end", "status"), [("1 / 0", "FAILED"), ("kill()", "KILLED"), ("sys.exit(0)", "FINISHED")])
def test_the_status_is_right_on_every_way_out(tmp_path, end, status):
    body = f"""
        import os, signal, sys
        from pathlib import Path
        from clantune_scale.config.schema import TrackingConfig
        from clantune_scale.tracking import Tracking
        kill = lambda: os.kill(os.getpid(), signal.SIGTERM)
        tracking = Tracking.open(TrackingConfig(mlflow=False), run_dir=Path({str(tmp_path)!r}), is_writer=True)
        tracking.emit("warning", 7, message="x")
        {end}
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(body)], capture_output=True, text=True, timeout=60)
    last = read_events(tmp_path / "events.jsonl")[-1]
    assert (last["kind"], last["status"], last["step"]) == ("run_end", status, 7)
    assert done.returncode == {"FAILED": 1, "KILLED": -signal.SIGTERM, "FINISHED": 0}[status]
    assert os.path.exists(tmp_path / "events.jsonl") and f"clan {status} after 7 steps" in done.stdout


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"directory": "/proc/clan_runs"}, "No such file"),
        ({"directory": __file__}, "exists"),
        ({"directory": "a" * 300}, "File name too long"),
        ({"directory": "a\0b"}, "null"),
    ],
)
def test_a_folder_that_cannot_be_made_is_a_sentence_with_a_remedy(settings, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"cannot be made: .*{reason}.* Set clantune.tracking.directory to"):
        create_run_dir(TrackingConfig(run_name="mine", **settings))


def test_every_rank_hears_that_a_folder_cannot_be_made_or_used(tmp_path):
    def refuse(run_dir):
        raise PermissionError(13, "Permission denied", str(run_dir))

    for directory, take in (("/proc/clan_runs", print), (str(tmp_path), refuse)):
        config = ClanConfig(population_size=1, tracking={"directory": directory, "run_name": "mine"})
        said = opening._look_on_leader(config, take)
        assert "clantune.tracking.directory" in said["error"] and said["error"].endswith(".")
