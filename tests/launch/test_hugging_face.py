"""The scripts of Hugging Face's loops, through their launchers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="the extra transformers")

from clantune_scale.tracking import read_events
from tests.launch.test_pretrain_line import UNIFORM, text_of
from tests.ranks import free_port

ROOT = Path(__file__).parents[2]
STEPS = 60


def _run(folder: Path, script: str, *arguments: Any, ranks: int) -> str:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", ranks, "--master_port", free_port()]
    command = [sys.executable, *(launcher if ranks > 1 else []), ROOT / "launch" / script, *arguments]
    command += ["--steps", STEPS, "--context", 32, "--width", 32, "--lr", 5e-3, "--batch", 32 // ranks]
    command += ["--test_windows", 32, "--text", text_of(folder)]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def _block() -> dict[str, Any]:
    return {
        "population_size": 4,
        "round_length": 6,
        "strategy": {"name": "clan", "options": {"trial_cost": 1.0, "trial_at": 0.1}},
        "fitness": {"num_samples": 32, "batch_size": 8},
        "tracking": {"run_name": "run", "mlflow": False},
    }


def _check(output: str, run: Path) -> None:
    losses = [float(line.split()[2]) for line in output.splitlines() if " loss " in line and "nats" in line]
    assert len(losses) == 2 and max(losses) < UNIFORM - 1.5
    rounds = [event for event in read_events(run / "events.jsonl") if event["kind"] == "round_end"]
    assert {phase["kind"] for event in rounds for phase in event["phases"]} == {"cooperative", "competitive"}
    assert (run / "champion.safetensors").exists()


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize("ranks", [1, 2])
def test_accelerates_loop(ranks, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"clantune": _block()}))
    output = _run(tmp_path, "accelerate_loop.py", "--cpu", "--config", "config.json", ranks=ranks)
    _check(output, tmp_path / "clan_runs" / "run")


@pytest.mark.slow
@pytest.mark.timeout(700)
@pytest.mark.parametrize("ranks", [1, 2])
def test_trainer(ranks, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"clantune": _block()}))
    arguments = ["--config", "config.json", "--output_dir", "out", "--save_steps", 30]
    output = _run(tmp_path, "hf_trainer.py", *arguments, ranks=ranks)
    _check(output, tmp_path / "out" / "clan_runs" / "run")
    assert (tmp_path / "out" / "checkpoint-30" / "clan" / f"rank-{ranks - 1:05d}.pt").exists()


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_trainer_with_the_block_in_deepspeeds_file(tmp_path):
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    config = dict.fromkeys(names, "auto") | {"zero_optimization": {"stage": 2}, "clantune": _block()}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    output = _run(tmp_path, "hf_trainer.py", "--deepspeed", "ds.json", "--output_dir", "out", ranks=2)
    _check(output, tmp_path / "out" / "clan_runs" / "run")
