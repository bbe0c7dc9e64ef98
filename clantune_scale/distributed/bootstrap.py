"""The clan's store, and what ranks tell each other on it before they are members of anything."""

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

#: What a launcher sets for every rank, and a member's world rewrites.
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: What torchrun's agent sets beside them: with these, torch would take its store for the member's.
AGENT_VARIABLES = ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID")
_MOST_SHOWN = 16

Address = tuple[str, int]


@dataclass(frozen=True)
class Launched:
    """A process's place among all that were launched, by the launcher's variables."""

    rank: int
    world_size: int
    address: str
    port: int

    @classmethod
    def read(cls, environ: MutableMapping[str, str]) -> Launched:
        """Raises TopologyError if a variable is missing."""
        missing = [name for name in LAUNCH_VARIABLES if name not in environ]
        if missing:
            raise TopologyError(
                f"the environment lacks {', '.join(missing)}, which a launcher sets for every rank. "
                f"Start the script with `deepspeed` or `torchrun`."
            )
        return cls(*(kind(environ[name]) for kind, name in zip((int, int, str, int), LAUNCH_VARIABLES, strict=True)))


def open_store(launched: Launched, port: int, timeout_s: float, environ: MutableMapping[str, str]) -> Store:
    """The store that all ranks reach, once all ranks have arrived on it.

    Raises:
        TopologyError: if it cannot be reached, or ranks do not arrive in time (all missing ones are named).
    """
    # Under torchrun the agent already serves a store at this address, and a second server would not bind.
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
    # One key to wait for, set by whoever comes last: if every rank waited for every other's, the store's host
    # would have to read the square of the number of ranks.
    if store.add("arrived", 1) == world_size:
        store.set("arrived/all", "")
    arrivals = [f"arrived/{other}" for other in range(world_size)]
    await_key(store, "arrived/all", arrivals, f"{world_size} ranks", timeout_s)
    return store


def await_key(store: Store, key: str, parts: list[str], what: str, timeout_s: float) -> None:
    """Waits until ``key`` is set; on the deadline names the ranks of those ``parts`` of it that are not.

    Raises:
        TopologyError: on the deadline.
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
    """Those of ``keys`` that are not set, by halves: few questions where few are missing."""
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
    """Rewrites the launch variables to the member's.

    Args:
        store: the clan's.
        topology, at: the grid and this rank's place in it.
        towards: an address that all hosts reach: this host's own is that on the route to it.
        timeout_s: to wait for the members' first ranks.
        environ: where the variables are.

    Returns:
        The member's store on the rank that serves it, and by member where each one's is.
    """
    member_store = None
    if at.member_rank == 0:
        # torch hosts its store in the same process "multi-tenant": it attaches to this one, so the port
        # cannot be taken between the moment it is chosen and the moment it is used.
        host = own_address(towards)
        member_store = serve(host, 0, timeout_s=timeout_s, multi_tenant=True)
        store.set(f"member/{at.member}", json.dumps([host, member_store.port]))
        # Whoever comes last puts all addresses under one key, which is all that the others read.
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
    """The address of this host on the route to ``towards``: no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))
        return probe.getsockname()[0]


def open_replica_group(store: Store, topology: Topology, at: Coordinates, timeout_s: float) -> ReplicaGroup:
    """The control group of this rank's column, with every peer's identity checked.

    Raises:
        DivergenceError: if somebody else is in it.
    """
    name = f"column/{at.member_rank}"
    group = stand_alone_group(store, name, at.member, topology.population_size, device_type="cpu", timeout_s=timeout_s)
    replica_group = ReplicaGroup(group, at.member, topology.population_size)
    peers = replica_group.gather_json([at.member, at.member_rank, socket.gethostname(), os.getpid()])
    expected = [[member, at.member_rank] for member in range(topology.population_size)]
    if [peer[:2] for peer in peers] != expected or len({tuple(peer[2:]) for peer in peers}) != len(peers):
        raise DivergenceError(
            f"column {at.member_rank} should hold one rank of each member, and holds (member, member rank, host, "
            f"pid) {peers}. Two launches may share {os.environ.get('MASTER_ADDR')}: give each its own master port."
        )
    return replica_group
