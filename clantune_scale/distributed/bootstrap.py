"""The bootstrap store: how launched ranks find each other, and how each rank enters its member's world."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from clantune_scale.distributed.groups import ReplicaGroup, stand_alone_group
from clantune_scale.distributed.store import serve
from clantune_scale.distributed.topology import Coordinates, Topology
from clantune_scale.errors import DivergenceError, TopologyError

#: A launcher sets these for every rank. Joining rewrites them to the member's world.
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: torchrun's agent sets these too. With them, torch would use the agent's store as the member's.
AGENT_VARIABLES = ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID")
_MOST_SHOWN = 16

Address = tuple[str, int]


@dataclass(frozen=True)
class Launched:
    """This process's rank in the launcher's world, as the launcher's variables give it.

    Attributes:
        rank, world_size: in the launcher's world.
        address, port: of rank 0.
    """

    rank: int
    world_size: int
    address: str
    port: int

    @classmethod
    def read(cls, environ: MutableMapping[str, str]) -> Launched:
        """Reads the launcher's variables.

        Raises:
            TopologyError: if one of them is missing.
        """
        missing = [name for name in LAUNCH_VARIABLES if name not in environ]
        if missing:
            raise TopologyError(
                f"the environment lacks {', '.join(missing)}, which a launcher sets for every rank. "
                f"Start the script with `deepspeed` or `torchrun`."
            )
        return cls(*(kind(environ[name]) for kind, name in zip((int, int, str, int), LAUNCH_VARIABLES, strict=True)))


def open_store(launched: Launched, port: int, timeout_s: float, environ: MutableMapping[str, str]) -> Store:
    """The clan's store, after all ranks have arrived on it.

    Args:
        launched: this process's rank in the launcher's world.
        port: where rank 0 serves the store.
        timeout_s: how long to wait for ranks that have not arrived.
        environ: where torchrun's variables are read.

    Raises:
        TopologyError: if the store cannot be reached, or ranks do not arrive in time (the message names them).
    """
    # Under torchrun the agent already serves a store at this address, and a second server could not bind to it.
    is_agent_store = environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    rank, world_size = launched.rank, launched.world_size
    try:
        if rank == 0 and not is_agent_store:
            tcp_store = serve(launched.address, port, timeout_s=timeout_s)
        else:
            tcp_store = TCPStore(
                launched.address, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
            )
    except (dist.DistError, OSError) as error:
        raise TopologyError(
            f"rank {rank} could not reach the clan's store at {launched.address}:{port} within {timeout_s:g} s "
            f"({error}). Check that rank 0 runs, that MASTER_ADDR is its address and that the port is open and free."
        ) from error
    attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"clan/{attempt}", tcp_store)
    store.set(f"arrived/{rank}", "")
    # The last rank to arrive sets one key that all ranks wait for. If every rank waited for every other rank's key, the
    # store would serve a number of requests that is quadratic in the number of ranks.
    if store.add("arrived", 1) == world_size:
        store.set("arrived/all", "")
    arrivals = [f"arrived/{other}" for other in range(world_size)]
    await_key(store, "arrived/all", arrivals, f"{world_size} ranks", timeout_s)
    return store


def await_key(store: Store, key: str, parts: list[str], what: str, timeout_s: float) -> None:
    """Waits until ``key`` is set.

    Args:
        store: the clan's.
        key: one rank sets it when all ``parts`` are set.
        parts: one key for each rank, which ends with its number.
        what: what the ranks are, as in "4 ranks".
        timeout_s: how long to wait.

    Raises:
        TopologyError: after ``timeout_s``; the message names the ranks whose part is not set.
    """
    try:
        store.wait([key], timedelta(seconds=timeout_s))
    except dist.DistError as error:
        missing = [part.rpartition("/")[2] for part in unset(store, parts)]
        shown = ", ".join(missing[:_MOST_SHOWN]) + (
            f" and {len(missing) - _MOST_SHOWN} more" * (len(missing) > _MOST_SHOWN)
        )
        raise TopologyError(
            f"of {what}, {shown or 'some'} did not arrive within {timeout_s:g} s. "
            f"Look at their logs, or raise clantune.join.timeout_s if they start slowly."
        ) from error


def unset(store: Store, keys: list[str]) -> list[str]:
    """Those of ``keys`` that are not set. Bisection needs few requests if few keys are missing."""
    if not keys or store.check(keys):
        return []
    if len(keys) == 1:
        return keys
    middle = len(keys) // 2
    return unset(store, keys[:middle]) + unset(store, keys[middle:])


def enter_member(
    store: Store,
    topology: Topology,
    at: Coordinates,
    towards: str,
    timeout_s: float,
    environ: MutableMapping[str, str],
) -> tuple[Store | None, tuple[Address, ...]]:
    """Rewrites the launcher's variables to the member's world.

    Args:
        store: the clan's.
        topology, at: the grid, and this rank's coordinates in it.
        towards: an address that all hosts reach. This host announces its address on the route to it.
        timeout_s: how long to wait for the members' first ranks.
        environ: where the variables are rewritten.

    Returns:
        The member's store on the rank that serves it and None on the others, and the address of each member's store.
    """
    member_store = None
    if at.member_rank == 0:
        # The store is multi-tenant: when the script makes its own store in this process, torch attaches to this one.
        # No other process can take the port between the moment it is chosen and the moment it is used.
        host = own_address(towards)
        member_store = serve(host, 0, timeout_s=timeout_s, multi_tenant=True)
        store.set(f"member/{at.member}", json.dumps([host, member_store.port]))
        # The last first rank collects all addresses under one key, and every rank reads that key only.
        if store.add("member", 1) == topology.population_size:
            keys = [f"member/{member}" for member in range(topology.population_size)]
            store.set("members", json.dumps([json.loads(address) for address in store.multi_get(keys)]))
    firsts = [f"member/{member}" for member in range(topology.population_size)]
    await_key(store, "members", firsts, "the members' first ranks, those of members", timeout_s)
    addresses = tuple((host, port) for host, port in json.loads(store.get("members")))
    host, port = addresses[at.member]
    for name in AGENT_VARIABLES:
        environ.pop(name, None)
    environ.update(
        RANK=str(at.member_rank), WORLD_SIZE=str(topology.member_size), MASTER_ADDR=host, MASTER_PORT=str(port)
    )
    return member_store, addresses


def own_address(towards: str) -> str:
    """The address of this host on the route to ``towards``, IPv4 or IPv6. No packet is sent.

    Raises:
        OSError: if no address of ``towards`` can be routed to.
    """
    error: OSError | None = None
    for family, kind, protocol, _, place in socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM):
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(place)
                return probe.getsockname()[0]
        # A name may have an address of a family that this host has no route for.
        except OSError as refused:
            error = refused
    raise error or OSError(f"{towards} has no address")


def open_replica_group(store: Store, topology: Topology, at: Coordinates, timeout_s: float) -> ReplicaGroup:
    """This rank's replica group over gloo, after the identity of every peer was checked.

    Args:
        store: the clan's.
        topology, at: the grid, and this rank's coordinates in it.
        timeout_s: of the group's collectives.

    Raises:
        DivergenceError: if a process that is not a peer is in the group.
    """
    name = f"replica_group/{at.member_rank}"
    group = stand_alone_group(store, name, at.member, topology.population_size, device_type="cpu", timeout_s=timeout_s)
    replica_group = ReplicaGroup(group, at.member, topology.population_size)
    peers = replica_group.gather_json([at.member, at.member_rank, socket.gethostname(), os.getpid()])
    expected = [[member, at.member_rank] for member in range(topology.population_size)]
    if [peer[:2] for peer in peers] != expected or len({tuple(peer[2:]) for peer in peers}) != len(peers):
        raise DivergenceError(
            f"the replica group of member rank {at.member_rank} should hold one rank of each member, and it holds "
            f"(member, member rank, host, pid) {peers}. Two launches may share {os.environ.get('MASTER_ADDR')}. Give "
            f"each launch its own master port."
        )
    return replica_group
