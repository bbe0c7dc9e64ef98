"""The Megatron-core script in a short form: through torchrun, two tensor-parallel members, on the CPU."""

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
STEPS = 60
# Nats per byte of a guess that knows nothing: log 256.
UNIFORM = 5.545


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The script's output and the run's folder."""
    folder = tmp_path_factory.mktemp("megatron")
    config = json.loads((ROOT / "configs" / "megatron.json").read_text())
    config["train_batch_size"] = 8
    config["clantune"] |= {"population_size": 2, "total_steps": 2 * STEPS, "fitness": {"num_samples": 64}}
    config["clantune"]["tracking"] |= {"mlflow": False}
    (folder / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "4", "--master_port", free_port()]
    command += [ROOT / "tests" / "launch" / "megatron_on_cpu.py", ROOT / "launch" / "pretrain_gpt_megatron.py"]
    command += ["--config", folder / "config.json", "--steps", STEPS, "--tensor", 2]
    command += ["--context", 64, "--lr", 3e-3, "--test_windows", 64]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout, folder / "clan_runs" / "megatron"


@pytest.mark.timeout(300)
def test_it_learns_text(finished):
    output, _ = finished
    (line,) = [line for line in output.splitlines() if line.startswith("test loss")]
    assert float(line.split()[2]) < UNIFORM - 1.5


def test_rounds_select_members(finished):
    rounds = [event for event in read_events(finished[1] / "events.jsonl") if event["kind"] == "round_end"]
    assert len(rounds) >= 2
    assert len({member["genome"]["values"]["lr"] for member in rounds[0]["members"]}) == 2


def test_the_champion_is_a_whole_model(finished):
    with safe_open(finished[1] / "champion.safetensors", framework="pt") as file:
        # Twice the width of a tensor rank's part.
        assert file.get_tensor("decoder.layers.1.mlp.linear_fc1.weight").shape == (256, 64)
        assert file.get_tensor("embedding.word_embeddings.weight").shape == (256, 64)
