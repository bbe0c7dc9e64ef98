"""The main job in a short form: through the launcher, on real text, with everything that it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from clantune_scale.tracking import read_events
from tests.ranks import free_port

ROOT = Path(__file__).parents[2]
# Nats per byte of the standard library's sources when each byte is guessed by its frequency alone.
UNIGRAM_ENTROPY = 3.24
STEPS = 120


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The script's output and the run's folder."""
    folder = tmp_path_factory.mktemp("quickstart")
    config = json.loads((ROOT / "configs" / "quickstart.json").read_text())
    # Twice the steps that are taken: the clan goes on exploring to the end of this short run.
    config["clantune"] |= {"total_steps": 2 * STEPS}
    (folder / "ds.json").write_text(json.dumps(config))
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [launcher, "--num_accelerators", "4", "--master_port", str(free_port())]
    command += [ROOT / "launch" / "pretrain_gpt.py", "--deepspeed", "--deepspeed_config", folder / "ds.json"]
    command += ["--steps", str(STEPS), "--test_windows", "128"]
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # The launcher starts its ranks with the python that is first in PATH.
    environment["PATH"] = f"{launcher.parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout, folder / "clan_runs" / "quickstart"


@pytest.mark.timeout(300)
def test_it_learns_text(finished):
    output, _ = finished
    (line,) = [line for line in output.splitlines() if line.startswith("test loss")]
    assert float(line.split()[2]) < UNIGRAM_ENTROPY - 0.3


def test_rounds_and_places_are_on_the_terminal(finished):
    output, run_dir = finished
    assert output.count("member    loss") >= 3
    for name in ("champion.safetensors", "schedule.json", "genes.png", "events.jsonl"):
        assert (run_dir / name).is_file() and str(run_dir / name) in output


def test_members_differed_and_the_best_was_cloned(finished):
    rounds = [event for event in read_events(finished[1] / "events.jsonl") if event["kind"] == "round_end"]
    first = rounds[0]["members"]
    assert len({member["genome"]["values"]["lr"] for member in first}) == 4
    best = min(first, key=lambda member: member["loss"])["member"]
    assert {member["donor"] for member in first} == {best}


def test_weight_decay_is_tuned_because_no_window_is_seen_twice(finished):
    start, *events = read_events(finished[1] / "events.jsonl")
    assert [gene["name"] for gene in start["genes"]] == ["lr", "weight_decay"]
    values = [event["members"][0]["genome"]["values"] for event in events if event["kind"] == "round_end"]
    assert all(own["weight_decay"] < 1.0 < own["lr"] for own in values[3:])  # it moves against the rate


def test_champion_is_a_model(finished):
    with safe_open(finished[1] / "champion.safetensors", framework="pt") as file:
        assert file.get_tensor("token.weight").shape == (256, 64)


def test_mlflow_has_the_clan_and_its_members(finished):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{finished[1].parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("clantune")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 4 and {run.info.status for run in runs} == {"FINISHED"}
    assert parent.data.params["config.population_size"] == "4" and "seconds/cooperative" in parent.data.metrics
    for child in children:
        losses = client.get_metric_history(child.info.run_id, "fitness/loss")
        assert len(losses) >= 3 and losses[-1].value < losses[0].value
        assert {"gene/lr", "step_size/lr", "lineage/donor"} <= set(child.data.metrics)
