"""A rank's coordinates in its member: from DeepSpeed's groups, or from model and config before an engine exists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.tensor_parallel import init_utils
from deepspeed.utils.bwc import (
    bwc_pipeline_parallel_world_size,
    bwc_tensor_model_parallel_group,
    bwc_tensor_model_parallel_rank,
    bwc_tensor_model_parallel_world_size,
)

from clantune_scale.config.deepspeed_limits import degrees_from_config
from clantune_scale.errors import ConfigError


@dataclass(frozen=True)
class Degrees:
    """A member's inner degrees, known before its engine exists.

    Attributes:
        pp, tp: number of pipeline stages and tensor shards.
        counted: how often DeepSpeed's ``train_batch_size`` counts each data-parallel rank. It counts AutoTP's tensor
            ranks as if they read data of their own.
    """

    pp: int = 1
    tp: int = 1
    counted: int = 1


def degrees_of(model: Any, mpu: Any, ds_config: Mapping[str, Any]) -> Degrees:
    """The degrees that DeepSpeed will give a member's engine.

    Raises:
        ConfigError: if the model and the config have different numbers of stages.
    """
    stages, tp = degrees_from_config(ds_config)
    recorded = init_utils._TP_MODEL_INIT_ARGS
    tp = max(tp, recorded["tp_size"] if recorded else 1)
    if isinstance(model, PipelineModule):
        if stages not in (1, model.num_stages):
            raise ConfigError(
                f"pipeline.stages is {stages}, and the PipelineModule was built with {model.num_stages} stages. "
                f"Use the same number for both, or leave pipeline.stages out."
            )
        return Degrees(pp=model.num_stages, tp=model._grid.model_parallel_size)
    if mpu is not None:
        return Degrees(tp=bwc_tensor_model_parallel_world_size(mpu))
    return Degrees(tp=tp, counted=tp)


@dataclass(frozen=True)
class MemberCoordinates:
    """A rank's coordinates in its member, and its tensor group (None without tensor parallelism)."""

    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    tp_rank: int
    tp_size: int
    tp_group: Any


def place_of(engine: Any) -> MemberCoordinates:
    """The coordinates of this rank in the engine's own groups."""
    mpu = engine.mpu
    is_pipeline = isinstance(engine.module, PipelineModule)
    return MemberCoordinates(
        pp_rank=engine.module.stage_id if is_pipeline else 0,
        pp_size=engine.module.num_stages if is_pipeline else 1,
        dp_rank=dist.get_rank(engine.data_parallel_group),
        dp_size=engine.dp_world_size,
        tp_rank=bwc_tensor_model_parallel_rank(mpu),
        tp_size=bwc_tensor_model_parallel_world_size(mpu),
        tp_group=bwc_tensor_model_parallel_group(mpu),
    )


def mpu_refusals(mpu: Any) -> Iterator[str]:
    """Yields the reasons for which a clan cannot run with a model-parallel unit."""
    stages = bwc_pipeline_parallel_world_size(mpu)
    if stages > 1:
        yield (
            f"mpu has {stages} pipeline stages, and DeepSpeed's engine for plain modules supports none. "
            f"Build a deepspeed.PipelineModule, or train with Megatron-core's own schedules."
        )
    if not hasattr(mpu, "get_data_parallel_group"):
        yield (
            f"mpu is a {type(mpu).__name__} without get_data_parallel_group(). Pass an mpu with Megatron's functions "
            f"for data- and tensor-parallel groups, ranks and world sizes."
        )


@torch.no_grad()
def unmarked_shards(module: torch.nn.Module, group: Any) -> list[str]:
    """Names of parameters that differ over a tensor group and do not name the dimension that they are sharded along.

    This is a collective of the tensor group. DeepSpeed counts the gradient of these parameters once in the norm.
    """
    found = []
    for name, parameter in module.named_parameters():
        if getattr(parameter, "tensor_model_parallel", False):
            if getattr(parameter, "partition_dim", -1) < 0:
                found.append(name)
            continue
        largest, smallest = (parameter.detach().double().sum().reshape(1) for _ in range(2))
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=group)
        if largest != smallest:
            found.append(name)
    return found
