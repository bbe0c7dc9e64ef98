"""The list of what a clan cannot run under, against the installed DeepSpeed and one rule at a time."""

from __future__ import annotations

import pytest

from clantune_scale.config.deepspeed_limits import (
    REMOVED_KEYS,
    REMOVED_ZERO_KEYS,
    EngineFacts,
    config_refusals,
    degrees_from_config,
    dtype_of,
    refusals,
    zero_stage,
)


def test_the_removed_keys_are_those_that_deepspeed_raises_on():
    from deepspeed.runtime import config

    assert config._REMOVED_TOP_LEVEL_CONFIG_KEYS.keys() == REMOVED_KEYS
    assert config._REMOVED_ZERO_CONFIG_KEYS.keys() == REMOVED_ZERO_KEYS


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fp16": {"enabled": True}}, "fp16 with ZeRO stage 0"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast with float16"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.device is nvme"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation is false"),
        (
            {"zero_optimization": {"stage": 2, "use_multi_rank_bucket_allreduce": False}},
            "use_multi_rank_bucket_allreduce is false",
        ),
        ({"elasticity": {}}, "'elasticity' was removed"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "zero_optimization.mics_shard_size was removed"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}, "both enabled"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op is 'sum'"),
        ({"tensor_parallel": {"autotp_size": 2}, "pipeline": {"stages": 2}}, "tensor_parallel.autotp_size is 2"),
        ({"pipeline": {"stages": 2}, "zero_optimization": {"stage": 2}}, "zero_optimization.stage is 2"),
        ({"sequence_parallel_size": 2, "data_parallel_size": 2}, "sequence-parallel degree is 2"),
        ({"expert_parallel": {"enabled": True}}, "expert_parallel is enabled"),
    ],
)
def test_each_is_refused_by_name_with_what_to_do(config, message):
    (refusal,) = config_refusals(config)
    assert message in refusal and refusal.endswith(".") and refusal.count(". ") >= 1


def test_an_ordinary_config_passes():
    config = {
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
        "bf16": {"enabled": True},
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
    }
    assert list(config_refusals(config)) == []
    assert (zero_stage(config), dtype_of(config)) == (3, "bf16")


def test_degrees_are_read_from_a_config():
    assert degrees_from_config({}) == (1, 1)
    assert degrees_from_config({"pipeline": {"stages": "auto"}, "tensor_parallel": {"autotp_size": 0}}) == (1, 1)
    assert degrees_from_config({"pipeline": {"stages": 4}}) == (4, 1)
    assert degrees_from_config({"tensor_parallel": {"autotp_size": 2}}) == (1, 2)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_model_with_experts_is_refused_where_deepspeed_refuses_it(stage):
    assert list(refusals(EngineFacts(has_moe=True, zero_stage=stage))) == []
    assert "mixture-of-experts" in next(refusals(EngineFacts(has_moe=True, zero_stage=3)))
