"""A member's whole weights, gathered from its ranks: ZeRO 3's partitions, tensor shards and experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.utils import groups

from clantune_scale.backends.deepspeed.place import MemberCoordinates

_EXPERTS = ".deepspeed_moe.experts.deepspeed_experts."


@torch.no_grad()
def full_weights(engine: Any, place: MemberCoordinates) -> dict[str, torch.Tensor] | None:
    """Weights and persistent buffers of this rank's stage in host memory, shared ones once (a member collective).

    Args:
        engine: DeepSpeed's.
        place: this rank's coordinates in the member.

    Returns:
        By name on the stage's first rank, with global expert numbers; None on the other ranks.
    """
    is_first = place.dp_rank == 0 and place.tp_rank == 0
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        for full_name, tensor in _whole(engine.module, name, parameter, place):
            if is_first:
                weights[full_name] = _on_host(tensor)
    if not is_first:
        return None
    wanted = engine.module.state_dict().keys()
    return weights | {name: _on_host(buffer) for name, buffer in engine.module.named_buffers() if name in wanted}


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _whole(
    module: torch.nn.Module, name: str, parameter: torch.nn.Parameter, place: MemberCoordinates
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the whole tensor, or one expert of each expert-parallel rank. A tensor is valid until the next one."""
    if is_moe_param(parameter):
        yield from _experts(module, name, parameter)
        return
    is_partitioned = hasattr(parameter, "ds_id")
    with deepspeed.zero.GatheredParameters([parameter]) if is_partitioned else nullcontext():
        yield name, _joined(parameter, place)


def _joined(parameter: torch.nn.Parameter, place: MemberCoordinates) -> torch.Tensor:
    """A parameter with its tensor shards joined."""
    if place.tp_size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return parameter.data
    if hasattr(parameter, "gather_params"):
        # AutoTP's layers know their layout. Their gather replaces the parameter's data, and their inverse would leave
        # the shard outside the optimizer's flat buffer. So the shard itself is restored.
        shard = parameter.data
        parameter.gather_params([parameter])
        whole, parameter.data = parameter.data, shard
        return whole
    shards = [torch.empty_like(parameter.data) for _ in range(place.tp_size)]
    dist.all_gather(shards, parameter.data.contiguous(), group=place.tp_group)
    stride = getattr(parameter, "partition_stride", 1)
    # Megatron's attribute, which torch's Parameter does not declare.
    dim: int = cast(Any, parameter).partition_dim
    pieces = [shard.chunk(stride, dim) for shard in shards]
    return torch.cat([piece[index] for index in range(stride) for piece in pieces], dim)


def _experts(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields one expert of each rank of the expert-parallel group, by its global number."""
    # The attribute is DeepSpeed's, which torch's Parameter does not declare.
    group = groups._get_expert_parallel_group(cast(Any, parameter).group_name)
    others = [torch.empty_like(parameter.data) for _ in range(dist.get_world_size(group))]
    dist.all_gather(others, parameter.data.contiguous(), group=group)
    before, after = name.split(_EXPERTS)
    local, _, rest = after.partition(".")
    num_local = cast(int, module.get_submodule(f"{before}.deepspeed_moe.experts").num_local_experts)
    for rank, expert in enumerate(others):
        yield f"{before}{_EXPERTS}{rank * num_local + int(local)}.{rest}", expert
