"""A clone of a Megatron-core member with dropout and a schedule goes on as its donor once their streams are equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.backends.families import Setup
from tests.backends.families import megatron as family
from tests.ranks import run_ranks

SETUPS = {
    "tp": Setup(tp=2, clip=0.5, options={"dropout": 0.1, "scheduled": True}),
    "pp-bf16": Setup(pp=2, dtype="bf16", accumulation=2, is_tied=True, options={"dropout": 0.1, "scheduled": True}),
    "dp-distributed-bf16": Setup(
        dp=2, dtype="bf16", clip=0.5, options={"dropout": 0.1, "scheduled": True, "distributed": True}
    ),
}


def _seed() -> None:
    """The same streams for the same rank of every member."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.manual_seed(torch.distributed.get_rank())
    model_parallel_cuda_manual_seed(31, force_reset_rng=True)


def _draw() -> torch.Tensor:
    """From the stream that tensor-parallel dropout reads."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        return torch.rand(4)


def _cloned(setup: Setup, directory: Any) -> dict[str, Any]:
    rounds = [["competitive", 3, [1.0, 4.0], 0], ["competitive", 9, [1.0, 1.0], -1]]
    block = {
        "population_size": 2,
        "round_length": 5,
        "fitness": {"num_samples": 16, "batch_size": 4},
        "tracking": {"directory": str(directory), "mlflow": False, "print_every_steps": 1000},
        "strategy": {"name": "tests.backends.scripted:Scripted", "options": {"rounds": rounds}},
    }
    run = family.start(setup, block)
    backend = run.clan.backend
    run.train(2)
    before = run.weights()
    run.train(3)
    _seed()
    run.train(6)
    after = run.weights()
    streams, stream = backend.random_streams(), torch.get_rng_state()
    drawn = _draw()
    backend.load_random_streams(streams)
    torch.set_rng_state(stream)
    again = _draw()
    further = _draw()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return {
        "before": before, "after": after, "streams": sorted(streams), "repeated": torch.equal(drawn, again),
        "moved": not torch.equal(again, further), "steps": run.scheduler.num_steps,
    }  # fmt: skip


@pytest.mark.parametrize(
    "setup",
    [pytest.param(setup, id=name, marks=[] if name == "tp" else pytest.mark.slow) for name, setup in SETUPS.items()],
)
def test_a_clone_with_dropout_goes_on_as_its_donor(setup, tmp_path):
    seen = run_ranks(4, _cloned, setup, tmp_path, preload=family.PRELOAD)
    donor, clone = seen[0], seen[2]
    assert any(not torch.equal(donor["before"][name], clone["before"][name]) for name in donor["before"])
    assert all(torch.equal(donor["after"][name], clone["after"][name]) for name in donor["after"])
    for rank in seen:
        assert rank["streams"] and rank["repeated"] and rank["moved"] and rank["steps"] == 6
