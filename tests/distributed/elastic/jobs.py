"""A small clan of DDP members in a process of its own each: what dies in these tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from clantune_scale.tracking import read_events

PRELOAD = ("torch", "tests.distributed.elastic.preload")
STEPS = 13


def block(folder: Path, *, population_size: int = 3, **faults: Any) -> dict[str, Any]:
    """Rounds of 5 steps, each on disk before the next begins; survivors wait 4 s for each other."""
    return {
        "population_size": population_size,
        "round_length": 5,
        "fitness": {"num_samples": 64, "batch_size": 8},
        "tracking": {"directory": str(folder), "run_name": "run", "mlflow": False, "print_every_steps": 1000},
        "checkpoint": {"asynchronous": False, "keep_last": 20, "champion": False},
        "join": {"timeout_s": 60},
        # On a busy machine a process may be late by seconds.
        "faults": {"min_members": 2, "deadline_s": 30.0, "rejoin_s": 4.0, **faults},
    }


def train(folder: str, settings: dict[str, Any], members: int, dp: int = 1, num_steps: int = STEPS) -> None:
    """A user's script: trains, writes this rank's weights down by its member's launched number, and finishes."""
    from tests.backends.families import Setup, ddp

    run = ddp.start(Setup(members=members, dp=dp), settings)
    run.train(num_steps)
    world = run.clan.world
    member = world.member if world.membership_change is None else world.membership_change.left[world.member]
    torch.save(run.weights(), f"{folder}/weights-{member}-{world.at.member_rank}.pt")
    run.clan.finish()


def weights(folder: Path, member: int, member_rank: int = 0) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"weights-{member}-{member_rank}.pt")


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder / "run" / "events.jsonl") if event["kind"] == kind]


def rounds(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "rounds").iterdir() if path.name.startswith("round-"))


def told(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("clan")]
