"""How a clan of thousands of ranks is laid out, without their processes: groups, seconds, megabytes, arrivals.

    python -m clantune_scale.bench.worlds
    python -m clantune_scale.bench.worlds --population 64 --dp 4 --pp 8 --tp 8 --arrivals 0

Sampled ranks build their member's device mesh and the groups that cross members on fake process groups, which make
no connections; each is compared with the layout computed another way. The arrival of all ranks at the clan's store is
real: as many clients as there are ranks, on this host, over loopback.
"""

from __future__ import annotations

import argparse
import os
import socket
import threading
import time
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup
from torch.distributed import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore  # it registers the backend "fake", too

from clantune_scale.distributed import world
from clantune_scale.distributed.bootstrap import Launched, open_store
from clantune_scale.distributed.groups import ReplicaGroup
from clantune_scale.distributed.topology import Topology
from clantune_scale.distributed.world import ClanGroups, ClanWorld
from clantune_scale.errors import ClanError


@dataclass(frozen=True)
class Layout:
    """What one topology took.

    Attributes:
        topology: that was laid out.
        num_sampled: ranks that built their groups.
        seconds_per_rank: for a rank's coordinates, mesh and groups.
        megabytes_per_rank: of Python's memory that a rank's share of the layout took at most.
    """

    topology: Topology
    num_sampled: int
    seconds_per_rank: float
    megabytes_per_rank: float


def lay_out(topology: Topology, num_samples: int = 32) -> Layout:
    """Builds the groups of ranks sampled evenly over the clan, and checks each against the definition.

    Raises:
        ClanError: if a rank's coordinates or groups are not what the definition says.
    """
    ranks = sorted({index * (topology.world_size - 1) // max(1, num_samples - 1) for index in range(num_samples)})
    seconds, most = 0.0, 0
    for rank in ranks:
        tracemalloc.start()
        start = time.perf_counter()
        built = _build(topology, rank)
        seconds += time.perf_counter() - start
        most = max(most, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        expected = _by_definition(topology, rank)
        if built != expected:
            raise ClanError(f"rank {rank} of {topology.describe()} built {built}, and its definition is {expected}")
    return Layout(topology, len(ranks), seconds / len(ranks), most / 2**20)


def _build(topology: Topology, rank: int) -> dict[str, object]:
    """What a rank has after the start: its place by torch's mesh, and the groups by the clan's own code."""
    member, member_rank = divmod(rank, topology.member_size)
    dist.init_process_group("fake", rank=member_rank, world_size=topology.member_size, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (topology.pp, topology.dp, topology.tp), mesh_dim_names=("pp", "dp", "tp"))
        coordinate = mesh.get_coordinate()
        assert coordinate is not None, "every rank of the group is in its mesh"
        pp, dp, tp = coordinate
        stands = (pp, dp, tp)
        outer = Topology.from_world(topology.world_size, population_size=topology.population_size)
        joined = ClanWorld(outer, outer.coordinates(rank), HashStore(), _fake_replica_group(topology, member), 60.0)
        joined.arrange(pp=topology.pp, tp=topology.tp, stands=stands)
        named: list[str] = []
        with mock.patch.object(world, "stand_alone_group", _fake_group(named)):
            groups = ClanGroups(joined, "cuda")
            team = tuple(range(topology.population_size))
            sizes = (groups.gradient(team).size(), groups.replica_group(team).size())
    finally:
        dist.destroy_process_group()
    return {"stands": stands, "sizes": sizes, "ranks": [_ranks_in(name) for name in named]}


def _fake_group(named: list[str]):
    """In the place of the function that connects ranks: notes which ones would be."""

    def stand_alone_group(store: object, name: str, rank: int, size: int, **_: object) -> FakeProcessGroup:
        named.append(name)
        return _fake_process_group(rank, size)

    return stand_alone_group


def _fake_process_group(rank: int, size: int) -> FakeProcessGroup:
    """A process group without connections. torch's stub lacks the options that its function takes."""
    create: Any = FakeProcessGroup._create_internal
    options: Any = FakeProcessGroup.Options
    return create(rank, size, options())


def _fake_replica_group(topology: Topology, member: int) -> ReplicaGroup:
    group = _fake_process_group(member, topology.population_size)
    return ReplicaGroup(group, member, topology.population_size)


def _ranks_in(name: str) -> list[int]:
    return [int(rank) for rank in name.rpartition("/")[2].split("-")]


def _by_definition(topology: Topology, rank: int) -> dict[str, object]:
    """The same groups, computed only from the order of ranks: ``[member, pipeline, data, tensor]``, tensor fastest."""
    at, rest = rank, []
    for degree in (topology.tp, topology.dp, topology.pp):
        at, place = divmod(at, degree)
        rest.append(place)
    tp, dp, pp = rest
    gradient = [
        ((m * topology.pp + pp) * topology.dp + d) * topology.tp + tp
        for m in range(topology.population_size)
        for d in range(topology.dp)
    ]
    replica_group = [m * topology.member_size + rank % topology.member_size for m in range(topology.population_size)]
    return {"stands": (pp, dp, tp), "sizes": (len(gradient), len(replica_group)), "ranks": [gradient, replica_group]}


def arrive(num_ranks: int, *, timeout_s: float = 300.0) -> float:
    """Seconds until as many clients as the clan has ranks have met on one store; a thread each.

    Raises:
        ClanError: if one of them did not.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    failed: list[str] = []
    stores: list[object] = []

    def meet(rank: int) -> None:
        try:
            launched = Launched(rank, num_ranks, "127.0.0.1", port)
            stores.append(open_store(launched, port, timeout_s, {}))
        except ClanError as error:
            failed.append(str(error))

    before = threading.stack_size(1 << 18)
    try:
        threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(num_ranks)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - start
    finally:
        threading.stack_size(before)
    if failed:
        raise ClanError(f"{len(failed)} of {num_ranks} ranks did not arrive; the first says: {failed[0]}")
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a line per topology."""
    parser = argparse.ArgumentParser(prog="clantune_scale.bench.worlds", description=__doc__.splitlines()[0])
    parser.add_argument("--population", type=int, help="members; with --dp, --pp and --tp in place of the two sizes")
    for degree in ("dp", "pp", "tp"):
        parser.add_argument(f"--{degree}", type=int, default=1, help=f"a member's {degree} degree")
    parser.add_argument("--samples", type=int, default=32, help="ranks that build their groups")
    parser.add_argument("--arrivals", type=int, default=4096, help="clients that meet on one store; 0 for none")
    options = parser.parse_args(argv)
    topologies = [Topology(64, dp=1, pp=8, tp=8), Topology(64, dp=4, pp=8, tp=8)]
    if options.population:
        topologies = [Topology(options.population, dp=options.dp, pp=options.pp, tp=options.tp)]
    for topology in topologies:
        layout = lay_out(topology, options.samples)
        print(
            f"{topology.describe()}: {layout.num_sampled} sampled ranks passed, "
            f"{1e3 * layout.seconds_per_rank:.1f} ms and {layout.megabytes_per_rank:.2f} MB a rank"
        )
    if options.arrivals:
        cores = os.cpu_count()
        print(f"{options.arrivals} ranks met on one store in {arrive(options.arrivals):.1f} s ({cores} cores)")


if __name__ == "__main__":
    main()
