"""A rank's entry into a generation: the launch's, or a later one with the members that are left."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch.distributed import Store

from clantune_scale.distributed.bootstrap import Launched, open_store
from clantune_scale.distributed.elastic.generation import Generation
from clantune_scale.distributed.elastic.quorum import Quorum, Rendezvous
from clantune_scale.distributed.elastic.supervisor import Supervisor
from clantune_scale.distributed.topology import Coordinates, Topology

if TYPE_CHECKING:
    from clantune_scale.config.schema import FaultsConfig


@dataclass(frozen=True)
class MembershipChange:
    """A loss of members. Members have the numbers that they were launched with.

    Attributes:
        generation: the number of the generation that began with this change.
        members: the lost members, and what is known of each.
        left: the members that continue, in the order of their present numbers.
        reason: the first failure that was seen.
        seconds: from that failure until the quorum closed.
    """

    generation: int
    members: dict[int, str]
    left: tuple[int, ...]
    reason: str
    seconds: float


@dataclass(frozen=True)
class Entry:
    """What a rank holds after its entry.

    Attributes:
        store: the clan's store in this generation.
        topology, at: the grid of the present members, and this rank's coordinates in it.
        supervisor: watches the other ranks.
        membership_change: the loss that led to this generation; None in the first one.
    """

    store: Store
    topology: Topology
    at: Coordinates
    supervisor: Supervisor
    membership_change: MembershipChange | None = None


def enter(
    generation: Generation,
    launched: Launched,
    topology: Topology,
    *,
    faults: FaultsConfig | None,
    timeout_s: float,
    port: int | None,
    environ: MutableMapping[str, str] = os.environ,
) -> Entry:
    """Finds the other ranks and starts to watch them.

    Args:
        generation: the one that begins.
        launched, topology: this process's rank in the launcher's world, and the grid of that world.
        faults: the block's ``faults`` section.
        timeout_s, port: see :func:`clantune_scale.distributed.world.join`.
        environ: of this process.

    Raises:
        TopologyError: if ranks of the launch do not arrive.
        MembersLostError: if a later generation begins without this rank's member, or cannot begin.
    """
    settings = faults or _no_faults()
    at = topology.coordinates(launched.rank)
    name = f"rank {at.member_rank} of member {at.member}"
    launched_members = tuple(range(topology.population_size))
    if generation.number == 0:
        store = open_store(launched, port or launched.port, timeout_s, environ)
        generation = replace(generation, launch_id=store.compare_set("launch", "", uuid.uuid4().hex[:12]).decode())
        supervisor = Supervisor(settings, generation, members=launched_members, name=name, environ=environ)
        present, change = launched_members, None
    else:
        supervisor = Supervisor(settings, generation, members=generation.members, name=name, environ=environ)
        store, quorum = _rejoin(generation, at, topology, supervisor)
        present, change = quorum.members, _membership_change(generation, quorum)
        # The grid has no gaps: members are numbered anew from 0, in the order of their launched numbers.
        topology = replace(topology, population_size=len(present))
        at = topology.coordinates(present.index(at.member) * topology.member_size + at.member_rank)
        supervisor.set_members(present)

    def name_of(rank: int) -> str:
        member, member_rank = divmod(rank, topology.member_size)
        return f"rank {member_rank} of member {present[member]}"

    supervisor.watch(store, rank=at.rank, size=topology.world_size, name=name_of)
    return Entry(store, topology, at, supervisor, change)


def _rejoin(
    generation: Generation, at: Coordinates, topology: Topology, supervisor: Supervisor
) -> tuple[Store, Quorum]:
    settings = supervisor.settings
    rendezvous = Rendezvous(
        generation,
        member=at.member,
        member_rank=at.member_rank,
        member_size=topology.member_size,
        min_members=settings.min_members or 1,
        rejoin_s=settings.rejoin_s,
    )
    with supervisor.within(rendezvous.longest_s, f"the rendezvous of generation {generation.number}"):
        return rendezvous.attend()


def _membership_change(generation: Generation, quorum: Quorum) -> MembershipChange:
    return MembershipChange(
        generation.number,
        quorum.missing,
        quorum.members,
        generation.failure,
        time.time() - generation.failed_at,
    )


def _no_faults() -> FaultsConfig:
    from clantune_scale.config.schema import FaultsConfig

    return FaultsConfig()
