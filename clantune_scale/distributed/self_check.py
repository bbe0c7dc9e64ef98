"""The start-up self-check: cheap, always run, and before the first step is taken."""

from __future__ import annotations

import torch
import torch.distributed as dist

from clantune_scale.distributed.world import ClanWorld
from clantune_scale.errors import DivergenceError
from clantune_scale.runtime.engine_protocol import EnginePlace


def check_world(world: ClanWorld, device: torch.device) -> None:
    """The default process group holds this member's ranks and nobody else's.

    Raises:
        DivergenceError: if a sum of member numbers over the member's world says otherwise.
    """
    size = dist.get_world_size()
    total = torch.tensor([float(world.member)], device=device)
    dist.all_reduce(total)
    if size != world.topology.member_size or total.item() != world.member * size:
        raise DivergenceError(
            f"member {world.member} should be a world of {world.topology.member_size} ranks, and its process group "
            f"has {size} with members that sum to {total.item():g} in place of {world.member * size}. "
            f"Let nothing initialize torch.distributed before clantune_scale.initialize() or join()."
        )


def parameter_layout(module: torch.nn.Module) -> list[list]:
    """[name, shape, dtype, trains] of every parameter, whole shapes also where ZeRO 3 holds a part."""
    return [
        [name, list(getattr(parameter, "ds_shape", parameter.shape)), str(parameter.dtype), parameter.requires_grad]
        for name, parameter in module.named_parameters()
    ]


def check_parameters(world: ClanWorld, backend: EnginePlace) -> None:
    """Names, shapes, dtypes and what trains are equal down the column.

    Raises:
        DivergenceError: with the first parameter that differs.
    """
    difference = world.replica_group.first_difference(parameter_layout(backend.module), noun="parameters")
    if difference is not None:
        other, theirs, ours = difference
        raise DivergenceError(
            f"member {other} has {theirs} where member 0 has {ours}. Build the same model on every rank: "
            f"a clan averages gradients parameter by parameter."
        )
