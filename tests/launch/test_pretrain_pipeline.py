"""The pipeline script in a short form: through DeepSpeed's launcher, two members of two stages each."""

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

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEPS = 40
# Nats per byte of a guess that knows nothing: log 256.
UNIFORM = 5.545


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The script's output and the run's folder."""
    folder = tmp_path_factory.mktemp("pipeline")
    config = json.loads((ROOT / "configs" / "pipeline.json").read_text())
    config |= {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4}
    config["optimizer"]["params"]["lr"] = 3e-3
    config["clantune"] |= {"total_steps": 2 * STEPS, "fitness": {"num_samples": 32}}
    config["clantune"]["tracking"] |= {"mlflow": False}
    (folder / "ds.json").write_text(json.dumps(config))
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [launcher, "--num_accelerators", "4", "--master_port", free_port()]
    command += [ROOT / "launch" / "pretrain_gpt_pipeline.py", "--deepspeed", "--deepspeed_config", folder / "ds.json"]
    command += ["--steps", STEPS, "--context", "64", "--test_windows", "32"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # The launcher starts its ranks with the python that is first in PATH.
    environment["PATH"] = f"{launcher.parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout, folder / "clan_runs" / "pipeline"


@pytest.mark.timeout(300)
def test_it_learns_text(finished):
    output, _ = finished
    (line,) = [line for line in output.splitlines() if line.startswith("test loss")]
    assert float(line.split()[2]) < UNIFORM - 1.5


def test_rounds_select_members(finished):
    rounds = [event for event in read_events(finished[1] / "events.jsonl") if event["kind"] == "round_end"]
    assert len(rounds) >= 2
    assert len({member["genome"]["values"]["lr"] for member in rounds[0]["members"]}) == 2


def test_the_champion_has_the_layers_of_both_stages(finished):
    names = set()
    for path in finished[1].glob("champion*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    assert {"tied_modules.token.weight", "1.position.weight", "3.mlp.0.weight", "4.weight"} <= names
