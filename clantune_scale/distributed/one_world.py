"""The world of a clan whose members lie on a line: the process group that the user made, or one process without any.

Nothing is joined and nothing is cut up. All ranks hold one model, which stands for all members.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore

from clantune_scale.distributed import world
from clantune_scale.distributed.groups import ReplicaGroup
from clantune_scale.distributed.topology import Topology
from clantune_scale.distributed.world import ClanWorld
from clantune_scale.errors import TopologyError

_PREFIX = "clantune"


def one_world(*, timeout_s: float) -> ClanWorld:
    """All ranks of the default process group, as one member's ranks; this process if there is no group.

    Args:
        timeout_s: seconds that a message about rounds may take.

    Raises:
        TopologyError: if this process has joined a clan of groups, which cut the world up.
    """
    if world.current() is not None:
        raise TopologyError(
            'the config says "members": "line", and this process has joined a clan whose members are groups of ranks. '
            "Remove the call of clantune_scale.join(): members on the line need no joining."
        )
    if not dist.is_initialized():
        topology = Topology(1)
        return ClanWorld(
            topology, topology.coordinates(0), HashStore(), ReplicaGroup(None, 0, 1), timeout_s, launched=1
        )
    world.release_at_exit()
    topology = Topology(1, dp=dist.get_world_size())
    # The default group's own store, under a prefix: no port is opened and no address is looked up.
    store = PrefixStore(_PREFIX, dist.distributed_c10d._get_default_store())
    at = topology.coordinates(dist.get_rank())
    return ClanWorld(topology, at, store, ReplicaGroup(None, 0, 1), timeout_s, launched=1)


def sum_over_world(tensor: torch.Tensor) -> None:
    """Sums a tensor over the default process group, in place; leaves it as it is if there is none."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
