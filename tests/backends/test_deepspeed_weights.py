"""A member's whole weights put together: tensor shards joined, experts by their global number, nothing disturbed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import clantune_scale
from clantune_scale.backends.deepspeed import DeepSpeedBackend
from clantune_scale.backends.deepspeed.place import unmarked_shards
from clantune_scale.errors import ClanError
from tests.backends.families import Setup, deepspeed_moe, deepspeed_tp
from tests.backends.small_runs import ds_config, in_member_worlds
from tests.backends.tensor_layers import Mpu, Sharded, Whole
from tests.ranks import run_ranks
from tests.small_clans import datasets

KINDS = {
    "auto-1": (deepspeed_tp, Setup(tp=2, options={"stage": 1, "kind": "auto"})),
    "auto-3": (deepspeed_tp, Setup(tp=2, options={"stage": 3, "kind": "auto"})),
    "mpu-1": (deepspeed_tp, Setup(tp=2, options={"stage": 1, "kind": "mpu"})),
    "experts": (deepspeed_moe, Setup(dp=2, options={"stage": 1})),
}


def _whole(rank: int, kind: str) -> Any:
    """Weights put together in between; the whole by the family's own way, before and after two more steps."""
    family, setup = KINDS[kind]
    run = family.start(setup, None)
    run.train(2)
    found = DeepSpeedBackend(run.engine).full_weights()
    seen = run.weights()
    run.train(4)
    return found, seen, run.weights()


def _undisturbed(rank: int, kind: str) -> Any:
    family, setup = KINDS[kind]
    run = family.start(setup, None)
    run.train(4)
    return run.weights()


@pytest.mark.parametrize("kind", [pytest.param(k, marks=pytest.mark.slow) if k == "auto-3" else k for k in KINDS])
def test_whole_weights_are_with_the_first_rank_and_training_goes_on_undisturbed(kind):
    (found, expected, after), (nothing, *_) = run_ranks(2, in_member_worlds, _whole, kind)
    assert nothing is None
    if kind == "experts":
        found = {
            name.replace("moe.deepspeed_moe.experts.deepspeed_experts.", "experts.")
            .replace("moe.deepspeed_moe.gate.wg", "gate"): tensor
            for name, tensor in found.items()
        }  # fmt: skip
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    undisturbed = run_ranks(2, in_member_worlds, _undisturbed, kind)[0]
    assert all(torch.equal(after[name], undisturbed[name]) for name in undisturbed)


class Stages:
    """An mpu that knows of pipeline stages."""

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 2

    def get_data_parallel_group(self) -> None:
        """Never asked."""


def _refused(rank: int, directory: str) -> Any:
    import deepspeed

    clantune_scale.join(1)
    deepspeed.init_distributed("gloo")
    mpu = Mpu(2)
    model = Sharded(mpu)
    whole = Whole(seed=mpu.get_tensor_model_parallel_rank())
    marks = (unmarked_shards(model, mpu.get_tensor_model_parallel_group()),
             unmarked_shards(whole, mpu.get_tensor_model_parallel_group()))  # fmt: skip
    del model.up.weight.partition_dim
    config = ds_config(1) | {"clantune": {"population_size": 1, "tracking": {"directory": directory, "mlflow": False}}}
    said = []
    for options in ({"model": model, "mpu": mpu}, {"model": Whole(), "mpu": Stages()}):
        try:
            clantune_scale.initialize(
                **options, model_parameters=options["model"].parameters(), config=config, eval_data=datasets()[1]
            )
        except ClanError as error:
            said.append(str(error))
    return marks, said


def test_shards_that_do_not_say_what_they_are_a_part_of_are_refused(tmp_path):
    for (marked, unmarked), (shard, stages) in run_ranks(2, in_member_worlds, _refused, str(tmp_path)):
        assert marked == [] and "up.weight" in unmarked and "last.bias" in unmarked
        assert (
            shard.startswith("parameters ['up.weight'] are marked as shards")
            and "Set tensor_model_parallel = True" in shard
        )
        assert stages.startswith("mpu has 2 pipeline stages") and "Build a deepspeed.PipelineModule" in stages
