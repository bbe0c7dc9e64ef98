import itertools
import time

import pytest

from clantune_scale.distributed.topology import Topology
from clantune_scale.errors import TopologyError


def test_members_are_contiguous_and_replica_groups_cross_them():
    topology = Topology.from_world(8, population_size=2)
    assert topology.dp == 4
    assert topology.member_ranks(1) == [4, 5, 6, 7]
    assert topology.replica_group_ranks(6) == [2, 6]
    assert topology.gradient_ranks(3) == list(range(8))


def test_a_gradient_group_keeps_to_its_pipeline_stage_and_tensor_part():
    topology = Topology.from_world(2 * 2 * 3 * 2, population_size=2, pp=2, tp=2)
    at = topology.coordinates(7)
    assert (at.member, at.pp, at.dp, at.tp) == (0, 1, 0, 1)
    assert topology.gradient_ranks(7) == [7, 9, 11, 19, 21, 23]


def test_coordinates_are_the_grid():
    topology = Topology(population_size=3, dp=2, pp=2, tp=2)
    for index in itertools.product(range(3), range(2), range(2), range(2)):
        at = topology.coordinates(int(topology.grid[index]))
        assert (at.member, at.pp, at.dp, at.tp) == index


def test_a_clan_of_16384_ranks_is_laid_out_without_processes():
    start = time.perf_counter()
    topology = Topology.from_world(16_384, population_size=64, pp=8, tp=8)
    groups = {tuple(topology.gradient_ranks(rank)) for rank in range(0, 16_384, 97)}
    replica_groups = {tuple(topology.replica_group_ranks(rank)) for rank in range(256)}
    assert all(len(group) == 64 * topology.dp for group in groups)
    assert sorted(itertools.chain(*replica_groups)) == list(range(16_384))
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("world_size", "expected"),
    [
        (16, "population_size(3) x pp(1) x tp(2) = 6 does not divide the 16 ranks that the launcher started. "
             "Launch 12 or 18 ranks, or set population_size to one of [1, 2, 4, 8]."),
        (4, "population_size(3) x pp(1) x tp(2) = 6 does not divide the 4 ranks that the launcher started. "
            "Launch 6 ranks or a multiple."),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_refused_with_the_arithmetic(world_size, expected):
    with pytest.raises(TopologyError) as error:
        Topology.from_world(world_size, population_size=3, tp=2)
    assert str(error.value) == expected


def test_a_rank_outside_the_clan_is_refused():
    with pytest.raises(TopologyError, match="rank 8 is outside the clan's 8 ranks"):
        Topology(population_size=2, dp=4).coordinates(8)
