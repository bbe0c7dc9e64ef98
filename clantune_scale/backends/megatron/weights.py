"""A member's weights as one model: tensor shards joined, and layers numbered over all pipeline stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.distributed as dist


def whole_names(module: torch.nn.Module) -> dict[str, str]:
    """Maps each parameter's or buffer's name on this stage to its name in a model without pipeline stages.

    Megatron numbers the layers of each stage from 0. Each layer also has its number in the whole model, from 1.
    """
    prefixes = {}
    for path, part in module.named_modules():
        parent, _, index = path.rpartition(".")
        if index.isdigit() and isinstance(getattr(part, "layer_number", None), int):
            prefixes[f"{path}."] = f"{parent}.{part.layer_number - 1}."
    names = [name for name, _ in module.named_parameters()] + [name for name, _ in module.named_buffers()]
    return {name: _renamed(name, prefixes) for name in names}


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    return prefixes.get(prefix, "") + name[len(prefix) :]


@torch.no_grad()
def joined(module: torch.nn.Module, tp_group: Any, *, is_gated: bool) -> dict[str, torch.Tensor]:
    """This stage's weights and persistent buffers in host memory, by their names in the whole model.

    This is a collective of the tensor-parallel group, and all of its ranks get the same. The last stage's copy of the
    embedding, which is the output layer, is left out because the first stage has it.

    Args:
        module: the stage.
        tp_group: the group over which its tensors are sharded.
        is_gated: whether the first layer of each MLP holds a gate followed by a value.
    """
    names = whole_names(module)
    weights = {}
    for name, parameter in module.named_parameters():
        if not getattr(parameter, "shared", False):
            weights[names[name]] = _whole(parameter, tp_group, is_gated=is_gated and "linear_fc1" in name)
    wanted = set(module.state_dict().keys())
    for name, buffer in module.named_buffers():
        if name in wanted:
            weights[names[name]] = buffer
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in weights.items()}


def _whole(parameter: torch.nn.Parameter, tp_group: Any, *, is_gated: bool) -> torch.Tensor:
    """A parameter with its tensor shards joined."""
    if tp_group.size() == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return parameter.data
    shards = [torch.empty_like(parameter.data) for _ in range(tp_group.size())]
    dist.all_gather(shards, parameter.data.contiguous(), group=tp_group)
    # The attribute is Megatron's, which torch's Parameter does not declare.
    dim: int = cast(Any, parameter).partition_dim
    if is_gated:
        # Each shard holds a part of the gate and a part of the value.
        halves = [shard.chunk(2, dim=dim) for shard in shards]
        shards = [gate for gate, _ in halves] + [value for _, value in halves]
    return torch.cat(shards, dim=dim)
