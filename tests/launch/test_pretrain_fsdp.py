"""The FSDP2 script in a short form: through torchrun, two members of two ranks."""

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
# Nats per byte of a guess that knows nothing: log 256.
UNIFORM = 5.545
STEPS = 20


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The script's output and the run's folder."""
    folder = tmp_path_factory.mktemp("fsdp")
    config = json.loads((ROOT / "configs" / "fsdp2.json").read_text())
    config["clantune"] |= {"round_length": 8, "total_steps": 2 * STEPS, "fitness": {"num_samples": 32}}
    config["clantune"]["tracking"] |= {"mlflow": False}
    (folder / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "4", "--master_port", free_port()]
    command += [ROOT / "launch" / "pretrain_gpt_fsdp.py", "--config", folder / "config.json", "--steps", STEPS]
    command += ["--context", 32, "--width", 32, "--lr", 1e-2, "--test_windows", 32, "--bf16"]
    command += ["--text", ROOT / "clantune_scale"]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout, folder / "clan_runs" / "fsdp2"


@pytest.mark.timeout(240)
def test_it_learns_text(finished):
    output, _ = finished
    (line,) = [line for line in output.splitlines() if line.startswith("test loss")]
    assert float(line.split()[2]) < UNIFORM - 1.0


def test_rounds_select_members(finished):
    rounds = [event for event in read_events(finished[1] / "events.jsonl") if event["kind"] == "round_end"]
    assert len(rounds) == 2
    assert len({member["genome"]["values"]["lr"] for member in rounds[0]["members"]}) == 2


def test_the_champion_is_a_whole_model_in_full_precision(finished):
    with safe_open(finished[1] / "champion.safetensors", framework="pt") as file:
        # Twice the rows of a rank's shard.
        assert file.get_tensor("blocks.1.mlp.0.weight").shape == (128, 32)
        # The head's weight is the embedding's, and the masters are in float32 whatever the model computes in.
        assert str(file.get_tensor("token.weight").dtype) == "torch.float32"
        assert "head.weight" not in set(file.keys())
