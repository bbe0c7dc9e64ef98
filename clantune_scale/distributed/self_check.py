"""The start-up self-check. It is cheap and runs before the first step of every run."""

from __future__ import annotations

import torch
import torch.distributed as dist

from clantune_scale.distributed.world import ClanWorld
from clantune_scale.errors import DivergenceError


def check_world(world: ClanWorld, device: torch.device) -> None:
    """Checks that the default process group holds this member's ranks and no others (a member collective).

    Args:
        world: this process's place in the clan.
        device: where the default process group's tensors live.

    Raises:
        DivergenceError: if the group has another size, or ranks of other members.
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
    """[name, shape, dtype, trains] of every parameter. Shapes are whole shapes under ZeRO 3 too."""
    return [
        [name, list(getattr(parameter, "ds_shape", parameter.shape)), str(parameter.dtype), parameter.requires_grad]
        for name, parameter in module.named_parameters()
    ]


def check_parameters(world: ClanWorld, module: torch.nn.Module) -> None:
    """Checks that all members have the same parameters: names, shapes, dtypes and which of them train.

    Args:
        world: this process's place in the clan.
        module: this member's model, or this rank's part of it.

    Raises:
        DivergenceError: names the first parameter that differs.
    """
    difference = world.replica_group.first_difference(parameter_layout(module), noun="parameters")
    if difference is not None:
        other, theirs, ours = difference
        raise DivergenceError(
            f"member {other} has {theirs}, and member 0 has {ours}. Build the same model on every rank: "
            f"a clan averages gradients parameter by parameter."
        )
