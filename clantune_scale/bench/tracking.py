"""What tracking costs the thread that trains: ``python -m clantune_scale.bench.tracking``.

A stand-in for training runs rounds and emits a clan's events: a ``round_end``, a ``phase_start`` and some ``step``s in
each round. Three kinds of tracking take turns, round by round, in one process. Differences are taken within each turn,
so that other load on the machine affects all alike:

- ``none``: writes nothing (every rank but one)
- ``file``: writes the events file
- ``mlflow``: writes the events file, and MLflow on SQLite behind it

The stand-in is matrix products of torch, or a loop of plain Python, which needs Python's lock all the time.
MLflow has a process of its own, so it competes only for processors.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from clantune_scale.config.schema import TrackingConfig
from clantune_scale.tracking import Tracking

KINDS = ("none", "file", "mlflow")
_STEPS = 5

Work = Callable[[int], object]


def measure(work: Work, *, num_rounds: int, num_members: int, round_s: float) -> dict[str, tuple[float, float]]:
    """By kind of tracking: median seconds per round inside ``emit``, and median seconds that a round takes longer.

    Args:
        work: does the given number of units of work.
        num_rounds: of each kind.
        num_members: of the clan.
        round_s: length of a round without tracking, seconds.
    """
    units = _calibrated(work, round_s)
    inside: dict[str, list[float]] = {kind: [] for kind in KINDS}
    added: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trackings = {kind: _open(kind, Path(folder), num_members) for kind in KINDS}
        # MLflow makes its database once, which takes seconds. No round should pay for that.
        time.sleep(20)
        for index in range(num_rounds):
            whole = {}
            # Each turn starts with another kind. Otherwise the kind after MLflow would always pay for it.
            for kind in KINDS[index % 3 :] + KINDS[: index % 3]:
                began = time.perf_counter()
                inside[kind].append(_round(trackings[kind], index, num_members, work, units))
                whole[kind] = time.perf_counter() - began
                _settle(trackings[kind])
            for kind in KINDS:
                added[kind].append(whole[kind] - whole["none"])
        for tracking in trackings.values():
            tracking.close()
    return {kind: (statistics.median(inside[kind]), statistics.median(added[kind])) for kind in KINDS}


def in_torch(units: int) -> object:
    """Matrix products, which release Python's lock."""
    left = torch.ones(256, 256)
    for _ in range(units):
        left = torch.mm(left, left).clamp(max=1.0)
    return left


def in_python(units: int) -> object:
    """A loop that holds Python's lock."""
    total = 0.0
    for number in range(units * 1000):
        total += number * 0.5
    return total


def _round(tracking: Tracking, index: int, num_members: int, work: Work, units: int) -> float:
    """Runs one round; returns its seconds inside ``emit``."""
    spent = 0.0

    def emit(kind: str, step: int, **fields: Any) -> None:
        nonlocal spent
        began = time.perf_counter()
        tracking.emit(kind, step, **fields)
        spent += time.perf_counter() - began

    start = (index + 1) * _STEPS
    # A round's events are sent while the next round trains, so that is when they can delay it.
    emit("round_end", start, **_round_end(index, num_members))
    emit("phase_start", start, round=index, phase="cooperative", num_steps=_STEPS)
    for step in range(_STEPS):
        work(units // _STEPS)
        emit("step", start + step + 1, round=index, phase="cooperative", loss=2.0, step_s=0.1, samples=step)
    return spent


def _settle(tracking: Tracking) -> None:
    """Waits until MLflow has its events, so that it does not delay the next round."""
    deadline = time.perf_counter() + 60
    while tracking.num_waiting and time.perf_counter() < deadline:
        time.sleep(0.01)
    # The queue is empty, but the other process may still be sending the last events.
    time.sleep(1.5)


def _calibrated(work: Work, seconds: float) -> int:
    """Units of work that take ``seconds``."""
    began = time.perf_counter()
    work(500)
    return max(_STEPS, int(500 * seconds / (time.perf_counter() - began)))


def _open(kind: str, folder: Path, num_members: int) -> Tracking:
    config = TrackingConfig(
        directory=str(folder), mlflow=kind == "mlflow", tracking_uri=f"sqlite:///{folder}/mlflow.db"
    )
    run_dir = folder / kind
    run_dir.mkdir()
    tracking = Tracking.open(config, run_dir=run_dir, is_writer=kind != "none")
    tracking.emit("run_start", 0, **_run_start(config, num_members))
    return tracking


def _run_start(config: TrackingConfig, num_members: int) -> Mapping[str, Any]:
    batch = {"clan_batch": num_members, "member_batch": 1, "micro_batch": 1, "accumulation": 1, "dp_size": 1}
    return {
        "run_id": "bench",
        "name": "bench",
        "population_size": num_members,
        "member_ranks": [[member] for member in range(num_members)],
        "topology": {},
        "strategy": "clan",
        "genes": [],
        "config": {"tracking": config},
        "batch": {**batch, "population_size": num_members},
        "versions": {},
        "total_steps": None,
        "resumed_from": None,
    }


def _round_end(index: int, num_members: int) -> Mapping[str, Any]:
    genome = {"values": {"lr": 1.0, "weight_decay": 1.0}, "step_sizes": {"lr": 0.1, "weight_decay": 0.1}}
    measured = {"gradient_norm": 1.0, "drift": 1e-3, "alignment": 0.5, "strikes": 0}
    member = {"loss": 2.0, "standard_error": 0.01, "genome": genome, "donor": 0, "reason": "takes member 0's state"}
    return {
        "round": index,
        "start_step": index * _STEPS,
        "phases": [{"kind": "cooperative", "num_steps": _STEPS, "keeps": True, "batch_factor": 1}],
        "explores": ["lr"],
        "members": [{"member": m, **member, "next_genome": genome, **measured} for m in range(num_members)],
        "consensus": {"lr": 1.0, "weight_decay": 1.0},
        "restored": False,
        "seconds": {"cooperative": 1.0, "evaluation": 0.1, "transfer": 0.1},
        "lr_factor": 1.0,
        "learning_rates": [1e-3] * num_members,
        "samples": index,
        "throughput": {"cooperative": {"steps": 5, "seconds": 1.0, "samples_per_s": 1.0, "tokens_per_s": None}},
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m clantune_scale.bench.tracking", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each kind")
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--round_s", type=float, default=2.0, help="seconds of a round")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for work in (in_torch, in_python):
        table = measure(work, num_rounds=given.rounds, num_members=given.members, round_s=given.round_s)
        print(
            f"{given.members} members, {given.rounds} rounds of {given.round_s:g} s each, {work.__name__}; per round:"
        )
        for kind, (emit_s, added_s) in table.items():
            print(f"  {kind:<7} in emit {1e3 * emit_s:6.2f} ms   added {1e3 * added_s:+7.1f} ms", flush=True)


if __name__ == "__main__":
    main()
