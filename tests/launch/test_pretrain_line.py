"""The script of members on the line in a short form: in one process, and under torchrun on two ranks."""

from __future__ import annotations

import json
import os
import random
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
STEPS = 60


def text_of(folder: Path) -> Path:
    """Sentences of made-up words, the same in every checkout: text that changes would flip some of the decisions."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 6))) for _ in range(60)]
    texts = folder / "texts"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number:02}.txt").write_text("\n".join(" ".join(draw.choices(words, k=12)) for _ in range(200)))
    return texts


def _run(folder: Path, *, ranks: int) -> tuple[str, Path]:
    """The script's output and the run's folder; 36 of its 60 steps are a trial's, in turns."""
    folder.mkdir()
    config = json.loads((ROOT / "configs" / "line.json").read_text())
    strategy = {"name": "clan", "options": {"trial_cost": 0.9, "trial_at": 0.1}}
    config["clantune"] |= {"round_length": 6, "total_steps": 120, "strategy": strategy}
    # The same batches of the window on any number of ranks: decisions weigh differences by their errors over batches.
    config["clantune"]["fitness"] = {"num_samples": 32, "batch_size": 8}
    config["clantune"]["tracking"] |= {"mlflow": False}
    (folder / "config.json").write_text(json.dumps(config))
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", ranks, "--master_port", free_port()]
    command = [sys.executable, *(launcher if ranks > 1 else []), ROOT / "launch" / "pretrain_gpt_line.py"]
    command += ["--config", folder / "config.json", "--steps", STEPS, "--context", 32, "--width", 32, "--lr", 5e-3]
    command += ["--test_windows", 32, "--text", text_of(folder)]
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout, folder / "clan_runs" / "line"


@pytest.mark.timeout(400)
def test_it_learns_and_decides_the_same_on_any_number_of_ranks(tmp_path):
    runs = {ranks: _run(tmp_path / f"ranks-{ranks}", ranks=ranks) for ranks in (1, 2)}
    rounds = {}
    for ranks, (output, folder) in runs.items():
        losses = [float(line.split()[2]) for line in output.splitlines() if " loss " in line and "nats" in line]
        assert len(losses) == 2 and max(losses) < UNIFORM - 1.5
        rounds[ranks] = [event for event in read_events(folder / "events.jsonl") if event["kind"] == "round_end"]
        assert any(phase["kind"] == "competitive" for event in rounds[ranks] for phase in event["phases"])
    assert len(rounds[1]) == len(rounds[2]) >= 3
    for one, two in zip(rounds[1], rounds[2], strict=True):
        # Sums of float32 in another order, through up to 60 steps of AdamW. A member whose rate throws it off course
        # (its loss is far above the best) has no loss to compare: the smallest difference grows from step to step.
        losses = [(m["loss"], n["loss"]) for m, n in zip(one["members"], two["members"], strict=True)]
        best = min(min(pair) for pair in losses)
        on_course = [pair for pair in losses if max(pair) < best + 0.1]
        assert on_course
        if max(map(max, losses)) > best + 0.01:  # Members that end alike are ranked by rounding.
            assert [m["donor"] for m in one["members"]] == [m["donor"] for m in two["members"]]
        for loss, other in on_course:
            assert loss == pytest.approx(other, rel=2e-3)
    with safe_open(runs[2][1] / "champion.safetensors", framework="pt") as file:
        assert file.get_tensor("blocks.0.mlp.0.weight").shape == (128, 32)
