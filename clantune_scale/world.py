"""Joining the clan: before any process group exists, a process learns its member and takes its world for its own.

The launcher's ranks meet on a bootstrap ``TCPStore``. Each member's first rank opens a store for its member;
``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT`` are rewritten to it. From there on every engine
sees the member as the whole world. ``LOCAL_RANK`` stays: it names the device.
"""

from __future__ import annotations

import atexit
import os
import socket
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from weakref import WeakSet

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from clantune_scale.errors import DivergenceError, TopologyError
from clantune_scale.groups import Column, stand_alone_group
from clantune_scale.topology import Coordinates, Topology

_MOST_SHOWN = 16
_LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class ClanWorld:
    """This process's place in the clan.

    Attributes:
        topology: the grid of all ranks.
        at: this process's coordinates in it.
        store: the bootstrap store that all ranks of the clan reach.
        column: the control group: this rank's peers in the other members, over gloo.
        timeout_s: seconds that joining, and any clan collective, may take.
    """

    topology: Topology
    at: Coordinates
    store: Store
    column: Column
    timeout_s: float
    member_store: Store | None = field(default=None, repr=False)

    @property
    def member(self) -> int:
        return self.at.member

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
    environ: MutableMapping[str, str] = os.environ,
) -> ClanWorld:
    """Joins the clan and makes this process's member its world. Call it before any process group exists.

    A second call with the same population size returns the first one's world.

    Args:
        population_size: number of members.
        pp, tp: a member's pipeline and tensor (times context) degrees; data parallelism takes the rest.
        timeout_s: how long to wait for ranks that have not arrived.
        port: where rank 0 serves the clan's store; ``MASTER_PORT`` where None, which is free until the first
            process group exists.
        environ: where ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT`` are read and rewritten.

    Raises:
        TopologyError: if a variable is missing, the ranks do not divide among the members, a process group
            exists already, or a rank does not arrive in time (all missing ones are named).
    """
    global _joined
    if _joined is not None:
        if _joined.topology.population_size != population_size:
            raise TopologyError(
                f"this process has joined a clan of {_joined.topology.population_size} members and is asked to join "
                f"one of {population_size}. Give join() and the config the same population_size."
            )
        return _joined
    if dist.is_initialized():
        raise TopologyError(
            f"a process group of {dist.get_world_size()} ranks exists already, and a member must become the world "
            f"before the first one. Call clantune_scale.initialize() or clantune_scale.join() before "
            f"deepspeed.init_distributed() and torch.distributed.init_process_group(), or start the script with "
            f"`deepspeed --module clantune_scale.run`."
        )
    rank, world_size, address, master_port = _launch_variables(environ)
    topology = Topology.from_world(world_size, population_size=population_size, pp=pp, tp=tp)
    at = topology.coordinates(rank)
    store = _bootstrap(rank, world_size, address, port or master_port, timeout_s, environ)
    member_store = _enter_member(store, topology, at, address, timeout_s, environ)
    column = _open_column(store, topology, at, timeout_s)
    _joined = ClanWorld(topology, at, store, column, timeout_s, member_store)
    atexit.register(_leave)
    return _joined


def _leave() -> None:
    """Lets go of every group while the interpreter still stands.

    A group's threads may still be putting away the last collective's tensors. One that needs the interpreter
    for it after that is gone ends the process with "terminate called without an active exception", and the
    launcher takes a finished run for a failed one; letting go of the group joins its threads.
    """
    global _joined
    for groups in _made:
        groups.close()
    if _joined is not None:
        _joined.column.group = None
    _joined = None


def _launch_variables(environ: MutableMapping[str, str]) -> tuple[int, int, str, int]:
    missing = [name for name in _LAUNCH_VARIABLES if name not in environ]
    if missing:
        raise TopologyError(
            f"the environment lacks {', '.join(missing)}, which a launcher sets for every rank. "
            f"Start the script with `deepspeed` or `torchrun`."
        )
    return int(environ["RANK"]), int(environ["WORLD_SIZE"]), environ["MASTER_ADDR"], int(environ["MASTER_PORT"])


def _bootstrap(
    rank: int, world_size: int, address: str, port: int, timeout_s: float, environ: MutableMapping[str, str]
) -> Store:
    """The store that all ranks reach, once all ranks have arrived on it."""
    # Under torchrun the agent already serves a store at this address, and a second server would not bind.
    is_agent_store = environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    timeout = timedelta(seconds=timeout_s)
    try:
        tcp_store = TCPStore(
            address,
            port,
            world_size,
            is_master=rank == 0 and not is_agent_store,
            timeout=timeout,
            wait_for_workers=False,
        )
    except dist.DistError as error:
        raise TopologyError(
            f"rank {rank} could not reach the clan's store at {address}:{port} within {timeout_s:g} s ({error}). "
            f"Check that rank 0 runs, that MASTER_ADDR is its address and that the port is open and free."
        ) from error
    attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"clan/{attempt}", tcp_store)
    store.set(f"arrived/{rank}", "")
    # One key to wait for, set by whoever comes last: if every rank waited for every other's, the store's host
    # would have to read the square of the number of ranks.
    if store.add("arrived", 1) == world_size:
        store.set("arrived/all", "")
    arrivals = [f"arrived/{other}" for other in range(world_size)]
    _await(store, "arrived/all", arrivals, f"{world_size} ranks", timeout_s)
    return store


def _await(store: Store, key: str, parts: list[str], what: str, timeout_s: float) -> None:
    """Waits until ``key`` is set; on the deadline names the ranks of those ``parts`` of it that are not."""
    try:
        store.wait([key], timedelta(seconds=timeout_s))
    except dist.DistError as error:
        missing = [part.rpartition("/")[2] for part in _unset(store, parts)]
        shown = ", ".join(missing[:_MOST_SHOWN]) + (
            f" and {len(missing) - _MOST_SHOWN} more" * (len(missing) > _MOST_SHOWN)
        )
        raise TopologyError(
            f"of {what}, {shown or 'some'} did not arrive within {timeout_s:g} s. "
            f"Look at their logs, or raise clantune.join.timeout_s if they start slowly."
        ) from error


def _unset(store: Store, keys: list[str]) -> list[str]:
    """Those of ``keys`` that are not set, by halves: few questions where few are missing."""
    if not keys or store.check(keys):
        return []
    if len(keys) == 1:
        return keys
    middle = len(keys) // 2
    return _unset(store, keys[:middle]) + _unset(store, keys[middle:])


def _enter_member(
    store: Store,
    topology: Topology,
    at: Coordinates,
    address: str,
    timeout_s: float,
    environ: MutableMapping[str, str],
) -> Store | None:
    """Rewrites the launch variables to the member's; returns the member's store on the rank that serves it."""
    member_store = None
    key = f"member/{at.member}"
    if at.member_rank == 0:
        # torch hosts its store in the same process "multi-tenant": it attaches to this one, so the port
        # cannot be taken between the moment it is chosen and the moment it is used.
        host = _own_address(address)
        member_store = TCPStore(
            host, 0, topology.member_size, is_master=True, timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
        store.set(key, f"{host} {member_store.port}")
    _await(store, key, [key], f"the first rank of member {at.member}", timeout_s)
    host, port = store.get(key).decode().split()
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID"):
        environ.pop(name, None)
    environ.update(RANK=str(at.member_rank), WORLD_SIZE=str(topology.member_size), MASTER_ADDR=host, MASTER_PORT=port)
    return member_store


def _own_address(towards: str) -> str:
    """The address of this host on the route to ``towards``: no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))
        return probe.getsockname()[0]


def _open_column(store: Store, topology: Topology, at: Coordinates, timeout_s: float) -> Column:
    """The control group of this rank's column, with every peer's identity checked."""
    name = f"column/{at.member_rank}"
    group = stand_alone_group(store, name, at.member, topology.population_size, device_type="cpu", timeout_s=timeout_s)
    column = Column(group, at.member, topology.population_size)
    peers = column.gather_json([at.member, at.member_rank, socket.gethostname(), os.getpid()])
    expected = [[member, at.member_rank] for member in range(topology.population_size)]
    if [peer[:2] for peer in peers] != expected or len({tuple(peer[2:]) for peer in peers}) != len(peers):
        raise DivergenceError(
            f"column {at.member_rank} should hold one rank of each member, and holds (member, member rank, host, "
            f"pid) {peers}. Two launches may share {os.environ.get('MASTER_ADDR')}: give each its own master port."
        )
    return column


class ClanGroups:
    """The stand-alone groups that carry tensors between members on one kind of device, made when first asked for.

    All ranks of a team ask for the same ones in the same order: making one is a collective.

    Args:
        world: this process's place in the clan.
        device_type: of the tensors that cross members.
    """

    def __init__(self, world: ClanWorld, device_type: str) -> None:
        self._world = world
        self._device_type = device_type
        self._groups: dict[str, Any] = {}
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
        return self.spread(team, ranks)

    def spread(self, team: tuple[int, ...], member_ranks: Sequence[int]) -> Any:
        """A group of this rank's member, and its like in all members of a team, as one group ranked member-major.

        Args:
            team: members, this one among them.
            member_ranks: ranks in the member's own world, this one among them.
        """
        topology = self._world.topology
        ranks = [topology.member_ranks(member)[rank] for member in team for rank in member_ranks]
        return self._group("gradient", ranks, self._device_type)

    def column(self, team: tuple[int, ...]) -> Any:
        """This rank's peers, one per member of the team."""
        return self._column(team, self._device_type)

    def member(self) -> Any:
        """All ranks of this rank's own member, for messages: the engine's groups carry tensors."""
        return self._group("member", self._world.topology.member_ranks(self._world.member), "cpu")

    def column_for(self, device_type: str) -> Any:
        """This rank's peers in all members, ranked by member, for tensors on another kind of device."""
        return self._column(tuple(range(self._world.topology.population_size)), device_type)

    def _column(self, team: tuple[int, ...], device_type: str) -> Any:
        column = self._world.topology.column_ranks(self._world.at.rank)
        if device_type == "cpu" and len(team) == len(column):
            return self._world.column.group
        return self._group("column", [column[member] for member in team], device_type)

    def _group(self, purpose: str, ranks: list[int], device_type: str) -> Any:
        # The ranks are the name: all that meet under it know it without talking.
        name = f"{purpose}/{device_type}/{'-'.join(map(str, ranks))}"
        if name not in self._groups:
            place = ranks.index(self._world.at.rank)
            self._groups[name] = stand_alone_group(
                self._world.store, name, place, len(ranks), device_type=device_type, timeout_s=self._world.timeout_s
            )
        return self._groups[name]
