"""Joining the clan: before any process group exists, a process learns its member and takes its world for its own.

The launcher's ranks meet on a bootstrap ``TCPStore``. Each member's first rank opens a store for its member;
``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT`` are rewritten to it. From there on every engine
sees the member as the whole world. ``LOCAL_RANK`` stays: it names the device.
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
        column: the control group: this rank's peers in the other members, over gloo.
        timeout_s: seconds that a clan collective may take.
        launched: members that were launched; more than there are, where some have died.
        guard: what happens when another process fails.
        membership_change: of members, which led to this epoch; None in the first.
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
        """The block for the members that there are: as it is, unless some have died."""
        if self.membership_change is None:
            return config
        # The rounds on disk are of more members: that is what this epoch is for.
        checkpoint = config.checkpoint.model_copy(update={"allow": [*config.checkpoint.allow, "population_size"]})
        return config.model_copy(update={"population_size": self.topology.population_size, "checkpoint": checkpoint})

    def present_batch(self, batch: BatchPlan) -> BatchPlan:
        """The members that there are keep their share each: the clan's batch is smaller where some have died."""
        size = self.topology.population_size
        return replace(batch, clan_batch=batch.member_batch * size, population_size=size)

    @property
    def may_lose_members(self) -> bool:
        """Whether the run goes on when members die."""
        return self.supervisor is not None and self.supervisor.settings.min_members is not None

    def follow(self, run_dir: Path, flush: Callable[[], None]) -> None:
        """From now on a survivor goes on with the run in this folder; before it starts again it calls ``flush``."""
        if self.supervisor is not None:
            self.supervisor.run_dir = run_dir
            self.supervisor.before_restart.append(flush)
            self.supervisor.precede_other_hooks()

    def leave(self) -> None:
        """The run is over for this rank; it waits, where members may die, until it is for all."""
        if self.supervisor is not None:
            self.supervisor.leave()

    def arrange(self, *, pp: int, tp: int, stands: tuple[int, int, int]) -> None:
        """Takes up the member's inner degrees, which its engine knows and :func:`join` need not.

        Args:
            pp, tp: pipeline and tensor degrees.
            stands: (pipeline, data, tensor) rank of this process by the engine's own groups.

        Raises:
            TopologyError: if the degrees do not divide the member, or its ranks are ordered otherwise.
        """
        topology = Topology.from_world(
            self.topology.world_size, population_size=self.topology.population_size, pp=pp, tp=tp
        )
        at = topology.coordinates(self.at.rank)
        if (at.pp, at.dp, at.tp) != stands:
            raise TopologyError(
                f"rank {at.member_rank} of member {at.member} is (pipeline, data, tensor) {stands} in its engine's "
                f"groups, and {(at.pp, at.dp, at.tp)} where ranks are ordered [pipeline, data, tensor], tensor "
                f"fastest. Build the engine's groups in that order, DeepSpeed's and Megatron-core's default."
            )
        self.topology, self.at = topology, at

    @property
    def is_clan_leader(self) -> bool:
        """Whether this is global rank 0, which writes logs."""
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

    A second call with the same population size returns the first one's world.

    Args:
        population_size: number of members that were launched.
        pp, tp: a member's pipeline and tensor (times context) degrees; data parallelism takes the rest.
        timeout_s: how long to wait for ranks that have not arrived.
        port: where rank 0 serves the clan's store; ``MASTER_PORT`` where None, which is free until the first
            process group exists.
        faults: the block's part of that name: what happens when members die.
        environ: where ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT`` are read and rewritten.

    Raises:
        TopologyError: if a variable is missing, the ranks do not divide among the members, a process group
            exists already, or a rank does not arrive in time (all missing ones are named).
        MembersLostError: if this process has started again after a failure, and too few members came back, or
            the others went on without it.
    """
    global _joined
    if _joined is not None:
        _check_alike(_joined, population_size, faults)
        return _joined
    if dist.is_initialized():
        raise TopologyError(
            f"a process group of {dist.get_world_size()} ranks exists already, and a member must become the world "
            f"before the first one. Call clantune_scale.initialize() or clantune_scale.join() before "
            f"deepspeed.init_distributed() and torch.distributed.init_process_group(), or start the script with "
            f"`deepspeed --module clantune_scale.run`."
        )
    generation = Generation.read(environ)
    launched = Launched.read(environ)
    topology = Topology.from_world(launched.world_size, population_size=population_size, pp=pp, tp=tp)
    entry = enter(generation, launched, topology, faults=faults, timeout_s=timeout_s, port=port, environ=environ)
    member_store, addresses = enter_member(entry.store, entry.topology, entry.at, launched.address, timeout_s, environ)
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
    atexit.register(_leave)
    return _joined


def _check_alike(joined: ClanWorld, population_size: int, faults: FaultsConfig | None) -> None:
    if joined.launched != population_size:
        raise TopologyError(
            f"this process has joined a clan of {joined.launched} members and is asked to join "
            f"one of {population_size}. Give join() and the config the same population_size."
        )
    if faults is not None and joined.supervisor is not None and joined.supervisor.settings != faults:
        raise TopologyError(
            f"this process has joined a clan with faults {joined.supervisor.settings!r}, and the config says {faults!r}. "
            f"Give join() the config that initialize() or attach() gets."
        )


def _leave() -> None:
    """Lets go of every group while the interpreter still stands.

    A group's threads may still be putting away the last collective's tensors. One that needs the interpreter
    for it after that is gone ends the process with "terminate called without an active exception", and the
    launcher takes a finished run for a failed one; letting go of the group joins its threads.
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
    """The stand-alone groups that carry tensors between members on one kind of device, made when first asked for.

    All ranks of a team ask for the same ones in the same order: making one is a collective.

    Args:
        world: this process's place in the clan.
        device_type: of the tensors that cross members.

    Attributes:
        vote: leaves members out of sums whose gradients are not finite; None where none is taken.
    """

    def __init__(self, world: ClanWorld, device_type: str) -> None:
        self._world = world
        self._device_type = device_type
        self._groups: dict[str, Any] = {}
        self.mask: NonfiniteMask | None = None
        _made.add(self)

    def close(self) -> None:
        """Lets go of the groups; the last holder's letting go ends their threads."""
        self._groups.clear()

    def gradient(self, team: tuple[int, ...]) -> Any:
        """All (member, data) ranks of a team with this rank's part of the model, ranked member-major."""
        topology, at = self._world.topology, self._world.at
        begin = topology.member_ranks(at.member)[0]
        ranks = [
            rank - begin for rank in topology.gradient_ranks(at.rank) if topology.coordinates(rank).member == at.member
        ]
        return self.across_members(team, ranks)

    def across_members(self, team: tuple[int, ...], member_ranks: Sequence[int]) -> Any:
        """A group of this rank's member, and its like in all members of a team, as one group ranked member-major.

        Args:
            team: members, this one among them.
            member_ranks: ranks in the member's own world, this one among them.
        """
        topology = self._world.topology
        ranks = [topology.member_ranks(member)[rank] for member in team for rank in member_ranks]
        return self._group("gradient", ranks, self._device_type)

    def weigh(self, gradients: Sequence[torch.Tensor], team: tuple[int, ...]) -> None:
        """What this rank brings to a sum over the team, before it: in place, left out where it is not finite."""
        if self.mask is not None:
            self.mask.weigh(gradients, team)

    def replica_group(self, team: tuple[int, ...]) -> Any:
        """This rank's peers, one per member of the team."""
        return self._replica_group(team, self._device_type)

    def member(self) -> Any:
        """All ranks of this rank's own member, for messages: the engine's groups carry tensors."""
        return self._group("member", self._world.topology.member_ranks(self._world.member), "cpu")

    def replica_group_for(self, device_type: str) -> Any:
        """This rank's peers in all members, ranked by member, for tensors on another kind of device."""
        return self._replica_group(tuple(range(self._world.topology.population_size)), device_type)

    def _replica_group(self, team: tuple[int, ...], device_type: str) -> Any:
        replica_group = self._world.topology.replica_group_ranks(self._world.at.rank)
        if device_type == "cpu" and len(team) == len(replica_group):
            return self._world.replica_group.group
        return self._group("column", [replica_group[member] for member in team], device_type)

    def _group(self, purpose: str, ranks: list[int], device_type: str) -> Any:
        # The ranks are the name: all that meet under it know it without talking.
        name = f"{purpose}/{device_type}/{'-'.join(map(str, ranks))}"
        if name not in self._groups:
            place = ranks.index(self._world.at.rank)
            # Where members may die, a sign of life that is missing says who it is; NCCL's watchdog only that some is.
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
