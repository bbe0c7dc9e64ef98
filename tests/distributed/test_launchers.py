"""Joining under torchrun, whose agent already serves a store, and before a model that ZeRO 3 partitions at birth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import deepspeed
import pytest
import torch

import clantune_scale
from tests.backends.small_runs import ds_config, flat_weights, in_member_worlds
from tests.ranks import free_port, run_ranks
from tests.small_clans import clan_config, datasets, train

SCRIPT = """
import json, sys, torch, torch.distributed as dist
import clantune_scale
clan = clantune_scale.join(2, timeout_s=60)
dist.init_process_group("gloo")
total = torch.tensor([float(clan.at.rank)])
dist.all_reduce(total)
with open(f"{sys.argv[1]}/{clan.at.rank}.json", "w") as file:
    json.dump([clan.member, dist.get_rank(), dist.get_world_size(), total.item()], file)
dist.barrier()
dist.destroy_process_group()
clan.replica_group.gather_json(None)
"""


def test_a_clan_forms_under_torchrun(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    root = Path(clantune_scale.__file__).parents[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "4",
        "--master_port",
        str(free_port()),
    ]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert found == [[0, 0, 2, 1.0], [0, 1, 2, 1.0], [1, 0, 2, 5.0], [1, 1, 2, 5.0]]


class Plain(torch.nn.Sequential):
    """Default initialization only: what a constructor does to a parameter that is partitioned already is lost."""

    def __init__(self):
        super().__init__(torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 8))

    def forward(self, inputs, targets):
        return (super().forward(inputs) - targets).square().mean()


def _train_model_made(rank, config, in_parts):
    clantune_scale.join(2, timeout_s=60)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    torch.manual_seed(0)
    stage_3 = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=stage_3, enabled=in_parts):
        model = Plain()
    data, valid = datasets()
    engine, _, loader, _ = clantune_scale.initialize(
        model=model, model_parameters=model.parameters(), config=config, training_data=data, eval_data=valid
    )
    train(engine, loader, 6)
    return flat_weights(engine)


@pytest.mark.slow
def test_a_model_made_under_zero_init_trains_as_one_that_was_not(tmp_path):
    config = clan_config(tmp_path, ds_config(3))
    partitioned = run_ranks(4, in_member_worlds, _train_model_made, config, True)
    whole = run_ranks(4, in_member_worlds, _train_model_made, config, False)
    assert all((a - b).abs().max() == 0 for a, b in zip(partitioned, whole, strict=True))
