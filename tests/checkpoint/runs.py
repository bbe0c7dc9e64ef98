"""Clans that stop and go on, several in one set of ranks: what an uninterrupted run is compared with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clantune_scale.transfer.state import state_digest
from tests.small_clans import start, train


@dataclass
class Outcome:
    """One launch on one rank, comparable by ``exact``.

    Attributes:
        exact: everything that a resume must bring back to the last bit.
        run_dir: the run's folder.
        round_name: what was committed when the run stopped.
    """

    exact: dict[str, Any]
    run_dir: str
    round_name: str | None = None


def seed(number: int) -> None:
    """Streams that differ from rank to rank, as a user sets them for dropout."""
    torch.manual_seed(1000 * number + int(os.environ["LOCAL_RANK"]))
    np.random.seed(number)


def launch(config: dict, num_steps: int, *, ends: str = "leave", seeded: int = 0, dropout: float = 0.2) -> Outcome:
    """Starts or continues a run and trains to ``num_steps``.

    Args:
        config: with the clan's block.
        num_steps: optimizer steps of the run in all.
        ends: ``"leave"`` (as a process that dies would, after the round that is being written), ``"stop"`` (commits
            the state at this step) or ``"finish"``.
        seeded: where the random streams begin; another number for a resumed run shows that they are restored.
        dropout: rate of the model's dropout.
    """
    seed(seeded)
    engine, loader = start(config, dropout=dropout)
    losses = train(engine, loader, num_steps)
    return end(engine, losses, ends)


def end(engine: Any, losses: list[float], ends: str) -> Outcome:
    """Ends a run and tells how it stood."""
    clan = engine.clan
    outcome = Outcome(standing(engine, losses), str(clan.recorder.run_dir))
    if ends == "stop":
        outcome.round_name = clan.stop()
    elif ends == "finish":
        clan.finish()
    else:
        leave(clan)
    return outcome


def standing(engine: Any, losses: list[float]) -> dict[str, Any]:
    """What must be equal to the last bit."""
    clan = engine.clan
    with torch.random.fork_rng([]):
        draw = torch.rand(3).tolist()
    group = engine.basic_optimizer.param_groups[0]
    return {
        "state": state_digest(clan.state()),
        "scalars": clan.state().scalars,
        "model": torch.cat([p.detach().float().flatten() for p in engine.module.parameters()]).double().sum().item(),
        "population": clan.population,
        "lineage": [(r.start_step, r.genomes, r.losses, r.donors, r.restored) for r in clan.progress.lineage],
        "draw": draw,
        "next": clan.progress.samplers[0].state_dict(),
        "counters": clan.backend.counters(),
        "rates": [group["lr"], clan.learning_rate(clan.phases.position.step)],
        "last_losses": losses[-2:],
        "kept": None
        if clan.progress.rollback_snapshot is None
        else [tensor.sum().item() for _, tensor in clan.progress.rollback_snapshot.tensors],
        "aside": None
        if clan.progress.phase_snapshot is None
        else [tensor.sum().item() for _, tensor in clan.progress.phase_snapshot.tensors],
        "samples": clan.progress.num_samples,
    }


def leave(clan: Any) -> None:
    """Ends a run without a word to its files, as a killed process would, once what is being written is written."""
    clan.rounds.finish()
    clan.rounds.release()
    clan.recorder.tracking.close("FAILED")
    clan.detach()


def resumed(config: dict, run_dir: str | Path, **settings: Any) -> dict:
    """The config that goes on from a run's newest round."""
    block = config["clantune"]
    return config | {
        "clantune": block | {"checkpoint": {**block.get("checkpoint", {}), **settings, "resume": str(run_dir)}}
    }


def named(config: dict, name: str, **settings: Any) -> dict:
    """The config with a run of its own."""
    block = config["clantune"]
    tracking = block["tracking"] | {"run_name": name}
    return config | {
        "clantune": block | {"tracking": tracking, "checkpoint": {**block.get("checkpoint", {}), **settings}}
    }
