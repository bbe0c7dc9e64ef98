"""Through the door: into the launch's epoch, or into one that begins with those that are left."""

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
    """Of members, and how the others went on. Members have the numbers that they were launched with.

    Attributes:
        epoch: that began with it.
        members: that are lost, and what is known of each.
        left: those that go on, in the order of their present numbers.
        reason: what was seen first.
        seconds: from then to the moment at which the others stood together again.
    """

    generation: int
    members: dict[int, str]
    left: tuple[int, ...]
    reason: str
    seconds: float


@dataclass(frozen=True)
class Entry:
    """What a rank has when it is inside: its place among those that are there."""

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
    """Meets the other ranks, and begins to watch them.

    Args:
        epoch: that begins.
        launched, topology: this process's place among all that were launched, and their grid.
        faults: the block's part of that name.
        timeout_s, port: as for :func:`clantune_scale.distributed.world.join`.
        environ: of this process.

    Raises:
        TopologyError: if ranks of the launch do not arrive.
        MembersLostError: if a later epoch begins without this rank's member, or cannot begin.
    """
    settings = faults or _no_faults()
    at = topology.coordinates(launched.rank)
    name = f"rank {at.member_rank} of member {at.member}"
    launched_members = tuple(range(topology.population_size))
    if generation.number == 0:
        store = open_store(launched, port or launched.port, timeout_s, environ)
        generation = replace(generation, launch_id=store.compare_set("launch", "", uuid.uuid4().hex[:12]).decode())
        supervisor, members, change = (
            Supervisor(settings, generation, members=launched_members, name=name, environ=environ),
            None,
            None,
        )
    else:
        supervisor = Supervisor(settings, generation, members=generation.members, name=name, environ=environ)
        store, quorum = _rejoin(generation, at, topology, supervisor)
        members, change = quorum.members, _membership_change(generation, quorum)
        topology = replace(topology, population_size=len(members))
        at = topology.coordinates(members.index(at.member) * topology.member_size + at.member_rank)
        supervisor.set_members(members)
    present = members or launched_members

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
