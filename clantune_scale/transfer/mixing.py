"""A weighted mean of all members' parameters, taken by all of them (HDET's converge stage)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from clantune_scale.distributed.groups import ReplicaGroup
from clantune_scale.transfer.state import MemberState


def averaged(state: MemberState) -> list[torch.Tensor]:
    """What all members have alike after an average."""
    return [tensor for name, tensor in state.tensors if name.startswith(("master.", "average."))]


@torch.no_grad()
def average_members(
    state: MemberState, weights: Sequence[float], replica_group: ReplicaGroup, group_for: Callable[[str], Any]
) -> None:
    """Every member's fp32 weights, and averaged weights where it keeps them, become the clan's weighted mean.

    Shards are averaged down their columns, never over ranks that hold different ones. Optimizer states stay their
    own. All ranks of the clan call it.

    Args:
        state: this rank's live state.
        weights: by member, summing to 1. A member of weight 0 may hold values that are not finite.
        column: this rank's control column.
        group_for: device type to the column's group on that device.
    """
    weight = weights[replica_group.member]
    for tensor in averaged(state):
        if weight:
            tensor.mul_(weight)
        else:
            tensor.zero_()
        if replica_group.size > 1:
            dist.all_reduce(tensor, group=group_for(tensor.device.type))
    state.refresh()
