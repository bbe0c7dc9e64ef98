"""Joining the clan: before any process group exists, a process learns its member, and the member becomes its world.

The launcher's ranks find each other on a bootstrap ``TCPStore``. Each member's first rank opens a store for its member.
``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT`` are rewritten to that store, so that every engine sees the
member as the whole world. ``LOCAL_RANK`` stays, because it names the device.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch.distributed import Store

from clantune_scale.config.batch import BatchPlan
from clantune_scale.distributed.bootstrap import Launched, enter_member, open_replica_group
from clantune_scale.distributed.elastic.entry import MembershipChange, enter
from clantune_scale.distributed.elastic.generation import Generation
from clantune_scale.distributed.elastic.supervisor import Supervisor
from clantune_scale.distributed.groups import ReplicaGroup, stand_alone_group
from clantune_scale.distributed.topology import Coordinates, Topology
from clantune_scale.errors import TopologyError
from clantune_scale.gradients.nonfinite_mask import NonfiniteMask

if TYPE_CHECKING:
    from clantune_scale.config.schema import ClanConfig, FaultsConfig


@dataclass
class ClanWorld:
    """This process's place in the clan.

    Attributes:
        topology: the grid of all ranks.
        at: this process's coordinates in it.
        store: the bootstrap store that all ranks of the clan reach.
        replica_group: this rank and its peers in the other members, over gloo; control messages use it.
        timeout_s: seconds that a clan collective may take.
        member_store: the member's store on the rank that serves it; None on the others.
        launched: number of members that were launched. Members that died are included.
        supervisor: decides what happens when another process fails.
        membership_change: the loss of members that led to this generation; None in the first generation.
    """

    topology: Topology
    at: Coordinates
    store: Store
    replica_group: ReplicaGroup
    timeout_s: float
    member_store: Store | None = field(default=None, repr=False)
    launched: int = 0
    supervisor: Supervisor | None = field(default=None, repr=False)
    membership_change: MembershipChange | None = None

    @property
    def member(self) -> int:
        """The index of this rank's member."""
        return self.at.member

    def present(self, config: ClanConfig) -> ClanConfig:
        """The block for the members that are left; unchanged if no member has died."""
        if self.membership_change is None:
            return config
        # The rounds on disk were written by more members, and this generation resumes from them.
        checkpoint = config.checkpoint.model_copy(update={"allow": [*config.checkpoint.allow, "population_size"]})
        return config.model_copy(update={"population_size": self.topology.population_size, "checkpoint": checkpoint})

    def present_batch(self, batch: BatchPlan) -> BatchPlan:
        """The batch plan for the members that are left. Each keeps its share, so the clan's batch shrinks."""
        size = self.topology.population_size
        return replace(batch, clan_batch=batch.member_batch * size, population_size=size)

    @property
    def may_lose_members(self) -> bool:
        """Whether the run continues when members die."""
        return self.supervisor is not None and self.supervisor.settings.min_members is not None

    def follow(self, run_dir: Path, flush: Callable[[], None]) -> None:
        """Names the run that a survivor resumes.

        Args:
            run_dir: the run's folder.
            flush: is called before this process restarts.
        """
        if self.supervisor is not None:
            self.supervisor.run_dir = run_dir
            self.supervisor.before_restart.append(flush)
            self.supervisor.precede_other_hooks()

    def leave(self) -> None:
        """Ends the run on this rank. If members may die, it waits until the run has ended on all ranks."""
        if self.supervisor is not None:
            self.supervisor.leave()

    def arrange(self, *, pp: int, tp: int, stands: tuple[int, int, int]) -> None:
        """Takes the member's inner degrees from its engine. :func:`join` may not know them.

        Args:
            pp, tp: pipeline and tensor degrees.
            stands: (pipeline, data, tensor) rank of this process in the engine's own groups.

        Raises:
            TopologyError: if the degrees do not divide the member, or the engine orders its ranks differently.
        """
        topology = Topology.from_world(
            self.topology.world_size, population_size=self.topology.population_size, pp=pp, tp=tp
        )
        at = topology.coordinates(self.at.rank)
        if (at.pp, at.dp, at.tp) != stands:
            raise TopologyError(
                f"rank {at.member_rank} of member {at.member} is (pipeline, data, tensor) {stands} in its engine's "
                f"groups, and the clan expects {(at.pp, at.dp, at.tp)}: it orders ranks [pipeline, data, tensor], "
                f"tensor fastest. Build the engine's groups in that order, which is the default of DeepSpeed and "
                f"Megatron-core."
            )
        self.topology, self.at = topology, at

    @property
    def is_clan_leader(self) -> bool:
        """Whether this is global rank 0. That rank writes the logs."""
        return self.at.rank == 0


_joined: ClanWorld | None = None
_made: WeakSet[ClanGroups] = WeakSet()


def current() -> ClanWorld | None:
    """The clan that this process has joined, or None."""
    return _joined


def join(
    population_size: int,
    *,
    pp: int = 1,
    tp: int = 1,
    timeout_s: float = 300.0,
    port: int | None = None,
    faults: FaultsConfig | None = None,
    environ: MutableMapping[str, str] = os.environ,
) -> ClanWorld:
    """Joins the clan and makes this process's member its world. Call it before any process group exists.

    A second call with the same population size returns the world of the first call.

    Args:
        population_size: number of members that were launched.
        pp, tp: a member's pipeline and tensor (times context) degrees; data parallelism takes the rest.
        timeout_s: how long to wait for ranks that have not arrived.
        port: where rank 0 serves the clan's store. None for ``MASTER_PORT``, which is free until the first process
            group exists.
        faults: the block's ``faults`` section: what happens when members die.
        environ: where ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT`` are read and rewritten.

    Raises:
        TopologyError: if a variable is missing, the number of ranks is not a multiple of the number of members, a
            process group exists already, or ranks do not arrive in time (the message names them).
        MembersLostError: if this process restarted after a failure, and too few members came back or the quorum
            closed without it.
    """
    global _joined
    if _joined is not None:
        _check_alike(_joined, population_size, faults)
        return _joined
    _refuse_group()
    generation = Generation.read(environ)
    launched = Launched.read(environ)
    topology = Topology.from_world(launched.world_size, population_size=population_size, pp=pp, tp=tp)
    entry = enter(generation, launched, topology, faults=faults, timeout_s=timeout_s, port=port, environ=environ)
    member_store, addresses = enter_member(entry.store, entry.topology, entry.at, launched.address, timeout_s, environ)
    # Survivors look for the next generation's store at these addresses.
    entry.supervisor.set_addresses(addresses)
    limit_s = faults.deadline_s if faults is not None and faults.min_members is not None else timeout_s
    replica_group = open_replica_group(entry.store, entry.topology, entry.at, limit_s)
    _joined = ClanWorld(
        entry.topology,
        entry.at,
        entry.store,
        replica_group,
        limit_s,
        member_store,
        population_size,
        entry.supervisor,
        entry.membership_change,
    )
    release_at_exit()
    return _joined


def _refuse_group() -> None:
    """Raises a TopologyError if a process group exists: its world is the whole launch, and no longer a member."""
    if dist.is_initialized():
        raise TopologyError(
            f"a process group of {dist.get_world_size()} ranks exists already, and a member must become the world "
            f"before the first group is made. Call clantune_scale.initialize() or clantune_scale.join() before "
            f"deepspeed.init_distributed() and torch.distributed.init_process_group(), or start the script with "
            f"`deepspeed --module clantune_scale.run`."
        )


def _check_alike(joined: ClanWorld, population_size: int, faults: FaultsConfig | None) -> None:
    if joined.launched != population_size:
        raise TopologyError(
            f"this process has joined a clan of {joined.launched} members and is asked to join "
            f"one of {population_size}. Use the same population_size in join() and in the config."
        )
    if faults is not None and joined.supervisor is not None and joined.supervisor.settings != faults:
        raise TopologyError(
            f"this process has joined a clan with faults {joined.supervisor.settings!r}, and the config says "
            f"{faults!r}. Pass the same config to join() and to initialize() or attach()."
        )


def release_at_exit() -> None:
    """Releases every group before the interpreter shuts down."""
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    """Releases every group while the interpreter still runs.

    A group's threads may still release the tensors of the last collective. A thread that needs the interpreter after
    its shutdown ends the process with "terminate called without an active exception", and the launcher reports a
    finished run as failed. Releasing the group joins its threads.
    """
    global _joined
    if _joined is not None and _joined.supervisor is not None:
        _joined.supervisor.leave()
    for groups in _made:
        groups.close()
    if _joined is not None:
        _joined.replica_group.group = None
    _joined = None


class ClanGroups:
    """The stand-alone groups that carry tensors between members on one kind of device.

    A group is made at its first use. Making one is a collective, so all ranks of a team use groups in the same order.

    Args:
        world: this process's place in the clan.
        device_type: of the tensors that cross members.

    Attributes:
        mask: leaves members with non-finite gradients out of the sums; None turns the mask off.
    """

    def __init__(self, world: ClanWorld, device_type: str) -> None:
        self._world = world
        self._device_type = device_type
        self._groups: dict[str, Any] = {}
        self.mask: NonfiniteMask | None = None
        _made.add(self)

    def close(self) -> None:
        """Releases the groups. Their threads end when the last reference is gone."""
        self._groups.clear()

    def gradient(self, team: tuple[int, ...]) -> Any:
        """The group of all (member, data) ranks of a team that hold this rank's part of the model, member-major."""
        topology, at = self._world.topology, self._world.at
        begin = topology.member_ranks(at.member)[0]
        ranks = [
            rank - begin for rank in topology.gradient_ranks(at.rank) if topology.coordinates(rank).member == at.member
        ]
        return self.across_members(team, ranks)

    def across_members(self, team: tuple[int, ...], member_ranks: Sequence[int]) -> Any:
        """One group of the same member ranks in all members of a team, member-major.

        Args:
            team: members, this one among them.
            member_ranks: ranks in the member's own world, this one among them.
        """
        topology = self._world.topology
        ranks = [topology.member_ranks(member)[rank] for member in team for rank in member_ranks]
        return self._group("gradient", ranks, self._device_type)

    def weigh(self, gradients: Sequence[torch.Tensor], team: tuple[int, ...]) -> None:
        """Applies the non-finite mask to this rank's terms of a sum over the team, in place. Call it before the sum."""
        if self.mask is not None:
            self.mask.weigh(gradients, team)

    def replica_group(self, team: tuple[int, ...]) -> Any:
        """The group of this rank and its peers, one per member of the team."""
        return self._replica_group(team, self._device_type)

    def member(self) -> Any:
        """The group of all ranks of this rank's own member, for messages. Tensors use the engine's groups."""
        return self._group("member", self._world.topology.member_ranks(self._world.member), "cpu")

    def replica_group_for(self, device_type: str) -> Any:
        """The group of this rank and its peers in all members, ranked by member, for tensors on another device type."""
        return self._replica_group(tuple(range(self._world.topology.population_size)), device_type)

    def _replica_group(self, team: tuple[int, ...], device_type: str) -> Any:
        replica_group = self._world.topology.replica_group_ranks(self._world.at.rank)
        if device_type == "cpu" and len(team) == len(replica_group):
            return self._world.replica_group.group
        return self._group("replica_group", [replica_group[member] for member in team], device_type)

    def _group(self, purpose: str, ranks: list[int], device_type: str) -> Any:
        # The name lists the ranks, so every rank of the group knows it without communication.
        name = f"{purpose}/{device_type}/{'-'.join(map(str, ranks))}"
        if name not in self._groups:
            place = ranks.index(self._world.at.rank)
            # NCCL's watchdog does not say which rank is missing, and the heartbeat does. Let the heartbeat be first.
            factor = 2 if device_type == "cuda" and self._world.may_lose_members else 1
            self._groups[name] = stand_alone_group(
                self._world.store,
                name,
                place,
                len(ranks),
                device_type=device_type,
                timeout_s=factor * self._world.timeout_s,
            )
        return self._groups[name]
