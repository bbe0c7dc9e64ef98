"""Files of the first schema stay readable.

A run of two members, four rounds, by the version that first wrote events and schedules; ``lineage.json`` is from that
version's ``Lineage``, and ``run.json`` has its ``run_start``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from clantune_scale import ClanSchedule
from clantune_scale.core.lineage import Lineage
from clantune_scale.tracking import read_events
from clantune_scale.tracking.history import lineage_from_events, schedule_from_events
from clantune_scale.tracking.live import Lines
from clantune_scale.tracking.mlflow import upload
from clantune_scale.tracking.report import write_report
from clantune_scale.tracking.watch import watch

DATA = Path(__file__).parent / "data" / "schema_1"


@pytest.fixture
def run_dir(tmp_path):
    """A copy, because the report is written beside the events."""
    return Path(shutil.copytree(DATA, tmp_path / "first_version"))


def test_events():
    events = read_events(DATA / "events.jsonl")
    assert {event["schema"] for event in events} == {1}
    assert {event["kind"] for event in events} == {"run_start", "phase_start", "step", "round_end", "run_end"}
    assert events[-1]["champion_loss"] == pytest.approx(4.6116, abs=1e-4)


def test_run_manifest():
    manifest = json.loads((DATA / "run.json").read_text())
    assert (manifest["schema"], manifest["kind"], manifest["population_size"]) == (1, "run", 2)


def test_lineage_is_what_the_events_tell():
    lineage = Lineage.from_json(json.loads((DATA / "lineage.json").read_text()))
    assert list(lineage) == list(lineage_from_events(read_events(DATA / "events.jsonl")))
    assert lineage.ancestry(1) == (0, 0, 0, 1)


def test_schedule_is_what_the_events_tell():
    schedule = ClanSchedule.from_json((DATA / "schedule.json").read_text())
    told = schedule_from_events(read_events(DATA / "events.jsonl"))
    for step in range(40):
        assert schedule.value_at("lr", step) == told.value_at("lr", step) == 1.0
        assert schedule.value_at("dropout", step) == told.value_at("dropout", step)


def test_report(run_dir):
    text = write_report(run_dir).read_text()
    assert "The run finished after 40 of 40 steps in 4 rounds." in text
    # Drift and alignment were not measured then: no empty picture of them.
    assert 'id="coherence"' not in text and 'id="gene-1"' in text


def test_upload_to_mlflow(run_dir, tmp_path):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run = MlflowClient(tracking_uri=uri).get_run(upload(run_dir, uri=uri))
    assert run.info.status == "FINISHED" and run.data.metrics["fitness/best"] == pytest.approx(4.6116, abs=1e-4)
    assert "clantune.artifacts_error" not in run.data.tags


def test_watch(run_dir, capsys):
    assert watch(run_dir, on=Lines()) == "FINISHED"
    assert "the champion is member 0, loss 4.6116" in capsys.readouterr().out
