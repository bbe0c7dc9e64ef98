"""Lightning's script: in one process with a resume, and under torchrun on two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning", reason="the extra `lightning` is not installed")

from clantune_scale.tracking import read_events
from tests.launch.test_pretrain_line import UNIFORM, text_of
from tests.ranks import free_port

ROOT = Path(__file__).parents[2]
STEPS = 60


def _run(folder: Path, *arguments: Any, ranks: int = 1, text: Path) -> str:
    block = {
        "population_size": 4,
        "round_length": 6,
        "total_steps": 120,
        "strategy": {"name": "clan", "options": {"trial_cost": 0.9, "trial_at": 0.1}},
        "fitness": {"num_samples": 32, "batch_size": 8},
        "tracking": {"mlflow": False},
    }
    (folder / "clan.json").write_text(json.dumps(block))
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", ranks, "--master_port", free_port()]
    command = [sys.executable, *(launcher if ranks > 1 else []), ROOT / "launch" / "lightning_fit.py"]
    command += ["--config", folder / "clan.json", "--context", 32, "--width", 32, "--lr", 5e-3, "--text", text]
    command += ["--batch", 32 // ranks, "--output", folder, *arguments]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def _rounds(folder: Path) -> list[list[dict[str, Any]]]:
    runs = sorted(folder.glob("clan_runs/*/events.jsonl"))
    return [[event for event in read_events(run) if event["kind"] == "round_end"] for run in runs]


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_script_trains_and_finds_a_champion(ranks, tmp_path):
    options = ["--steps", STEPS, *(["--devices", 2, "--strategy", "ddp"] if ranks == 2 else [])]
    output = _run(tmp_path, *options, ranks=ranks, text=text_of(tmp_path))
    (said,) = (line for line in output.splitlines() if line.startswith("champion of loss"))
    assert float(said.split()[3]) < UNIFORM - 1.5
    (rounds,) = _rounds(tmp_path)
    assert {phase["kind"] for event in rounds for phase in event["phases"]} == {"cooperative", "competitive"}
    assert rounds[-1]["step"] == STEPS and list(tmp_path.glob("clan_runs/*/champion.safetensors"))
