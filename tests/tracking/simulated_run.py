"""Events of a run that never was: as many rounds and members as a test wants, in seconds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from clantune_scale.core.genome import Gene

GENES = (
    Gene("lr", relative=True),
    Gene("dropout", kind="specialized", scale="linear", bounds=(0.0, 0.3), initial=0.1, step_size=0.03, max_change=0.1),
)
ROUND_STEPS = 20
COMPETITIVE_STEPS = 2
# Unix time; a second per step from here on. MLflow takes a run that began in 1970 for one that has no beginning.
BEGAN_S = 1.8e9


def start(*, num_rounds: int, num_members: int, name: str = "simulated", genes: tuple[Gene, ...] = GENES) -> dict:
    """The ``run_start`` event."""
    return {
        "schema": 1,
        "kind": "run_start",
        "time_s": BEGAN_S,
        "step": 0,
        "run_id": name,
        "name": name,
        "population_size": num_members,
        "member_ranks": [[member] for member in range(num_members)],
        "topology": {"dp": 1},
        "strategy": "classic",
        "genes": [asdict(gene) for gene in genes],
        "config": {"tracking": {"tracking_uri": None, "experiment": "clantune", "mlflow": False}},
        "batch": {
            "clan_batch": 4 * num_members,
            "member_batch": 4,
            "micro_batch": 4,
            "accumulation": 1,
            "dp_size": 1,
            "population_size": num_members,
        },
        "versions": {"torch": "2.13.0"},
        "total_steps": num_rounds * ROUND_STEPS,
        "initial_loss": 5.5,
        "resumed_from": None,
    }


def events(*, num_rounds: int, num_members: int, seed: int = 0, frozen_after: int | None = None) -> Iterator[dict]:
    """``run_start``, then a ``step`` and a ``round_end`` for every round; no ``run_end``.

    The loss follows the learning rate's gene (best at 2 scale units, then ever lower), and not the dropout. The
    weakest quarter takes the states of the fittest, and mutates.

    Args:
        num_rounds: 20 steps each, the last two competitive.
        num_members: at least 4, so that a quarter is someone.
        seed: of everything.
        frozen_after: round after which nothing is explored and nobody copies.
    """
    yield start(num_rounds=num_rounds, num_members=num_members)
    random = np.random.default_rng(seed)
    lr, dropout = np.zeros(num_members), np.full(num_members, 0.1)
    for index in range(num_rounds):
        explores = frozen_after is None or index < frozen_after
        aim = 2 - 3 * index / num_rounds
        noise = random.normal(0, 0.003, num_members)
        loss = 1.5 + 4 * (index + 1) ** -0.3 + 0.1 * (lr - aim) ** 2 + noise
        donors = np.arange(num_members)
        if explores:
            order, quarter = np.argsort(loss), max(1, num_members // 4)
            donors[order[-quarter:]] = order[:quarter]
        yield _step(index, float(loss[0]))
        yield _round_end(index, loss, lr, dropout, donors, explores, random)
        moved = donors != np.arange(num_members)
        lr = lr[donors] + moved * random.normal(0, 0.3, num_members)
        dropout = np.clip(dropout[donors] + moved * random.normal(0, 0.02, num_members), 0, 0.3)


def write(run_dir: Path, **kwargs) -> Path:
    """The events of :func:`events` as ``run_dir/events.jsonl``."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / "events.jsonl", "w") as file:
        file.writelines(json.dumps(event) + "\n" for event in events(**kwargs))
    return run_dir


def _step(index: int, loss: float) -> dict:
    end = (index + 1) * ROUND_STEPS
    measured = {"round": index, "phase": "competitive", "loss": loss + 0.1, "step_s": 0.1, "samples": 16 * end}
    return {"schema": 1, "kind": "step", "time_s": BEGAN_S + end, "step": end, **measured}


def _round_end(index, loss, lr, dropout, donors, explores, random) -> dict:
    end = (index + 1) * ROUND_STEPS
    cooperative = {
        "kind": "cooperative",
        "num_steps": ROUND_STEPS - COMPETITIVE_STEPS,
        "keeps": True,
        "batch_factor": 1,
    }
    competitive = {**cooperative, "kind": "competitive", "num_steps": COMPETITIVE_STEPS}
    return {
        "schema": 1,
        "kind": "round_end",
        "time_s": BEGAN_S + end,
        "step": end,
        "round": index,
        "start_step": end - ROUND_STEPS,
        "phases": [cooperative, competitive],
        "explores": [gene.name for gene in GENES] if explores else [],
        "averaged": False,
        "members": [_member(m, loss, lr, dropout, donors, random) for m in range(len(loss))],
        "consensus": {"lr": float(np.exp(lr.mean())), "dropout": float(dropout.mean())},
        "restored": False,
        "seconds": {"cooperative": 2.0, "competitive": 0.25, "evaluation": 0.5, "transfer": 0.25},
        "lr_factor": 1.0,
        "learning_rates": [1e-3 * math.exp(x) for x in lr],
        "scheduled_rate": 1e-3,
        "samples": 16 * end,
        "tokens": 16 * 128 * end,
        "throughput": {
            "cooperative": {"steps": 18, "seconds": 2.0, "samples_per_s": 144.0, "tokens_per_s": 18432.0},
            "competitive": {"steps": 2, "seconds": 0.25, "samples_per_s": 128.0, "tokens_per_s": 16384.0},
        },
        "straggler": {"member": 1, "seconds": 0.5, "median_s": 0.1} if index == 1 else None,
    }


def _member(member, loss, lr, dropout, donors, random) -> dict:
    values = {"lr": math.exp(lr[member]), "dropout": float(dropout[member])}
    genome = {"values": values, "step_sizes": {"lr": 0.1, "dropout": 0.03}}
    return {
        "member": member,
        "loss": float(loss[member]),
        "standard_error": 0.01,
        "genome": genome,
        "donor": int(donors[member]),
        "reason": "",
        "next_genome": genome,
        "gradient_norm": float(random.lognormal()),
        "drift": float(1e-3 * random.lognormal()),
        "alignment": float(random.uniform(0.2, 0.9)),
        "strikes": int(member == 2),
    }
