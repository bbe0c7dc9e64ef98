import os

import numpy as np
import pytest
import torch
import torch.distributed as dist

from clantune_scale.distributed import world
from clantune_scale.distributed.groups import stand_alone_group
from clantune_scale.errors import TopologyError
from tests.ranks import RankError, free_port, run_ranks


def _join_and_sum(population_size):
    global_rank = int(os.environ["RANK"])
    clan = world.join(population_size, timeout_s=30)
    dist.init_process_group("gloo")
    in_member = torch.tensor([float(global_rank)])
    dist.all_reduce(in_member)
    in_replica_group = clan.replica_group.gather(np.array([global_rank])).ravel().tolist()
    shared = torch.tensor([float(global_rank)])
    dist.all_reduce(shared, group=world.ClanGroups(clan, "cpu").gradient((0, 1, 2)))
    notes = clan.replica_group.gather_json({"rank": global_rank, "value": 0.1 * global_rank})
    result = (dist.get_rank(), dist.get_world_size(), in_member.item(), in_replica_group, shared.item(), notes)
    dist.barrier()
    dist.destroy_process_group()
    return result


def test_a_member_is_the_world_and_replica_groups_cross_members():
    results = run_ranks(6, _join_and_sum, 3)
    for rank, (member_rank, size, in_member, in_replica_group, shared, notes) in enumerate(results):
        member = rank // 2
        assert (member_rank, size) == (rank % 2, 2)
        assert in_member == 4 * member + 1
        assert in_replica_group == [rank % 2, 2 + rank % 2, 4 + rank % 2]
        assert shared == 15
        assert notes == [{"rank": r, "value": 0.1 * r} for r in in_replica_group]


def _join_twice():
    first = world.join(2, timeout_s=30)
    assert world.join(2) is first
    world.join(1)


def test_joining_again_returns_the_same_clan_and_another_size_is_refused():
    with pytest.raises(RankError, match="joined a clan of 2 members and is asked to join one of 1"):
        run_ranks(2, _join_twice)


def _join_too_late():
    dist.init_process_group("gloo")
    world.join(2)


def test_joining_after_a_process_group_exists_is_refused():
    with pytest.raises(RankError, match="a process group of 2 ranks exists already.*deepspeed --module"):
        run_ranks(2, _join_too_late)


def _join_but_one():
    if os.environ["RANK"] == "2":
        return None
    world.join(2, timeout_s=3)


def test_a_rank_that_does_not_arrive_is_named():
    with pytest.raises(RankError, match=r"of 4 ranks, 2 did not arrive within 3 s.*clantune\.join\.timeout_s"):
        run_ranks(4, _join_but_one)


def test_an_unreachable_store_is_named():
    environ = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with pytest.raises(TopologyError, match=r"rank 1 could not reach the clan's store at 127\.0\.0\.1:\d+ within 1 s"):
        world.join(2, timeout_s=1, environ=environ)


def test_without_a_launcher_the_missing_variables_are_named():
    with pytest.raises(TopologyError, match="lacks WORLD_SIZE, MASTER_ADDR, MASTER_PORT"):
        world.join(2, environ={"RANK": "0"})


def _meet_again():
    clan = world.join(3, timeout_s=30)
    sums = []
    for attempt in range(3):
        group = stand_alone_group(clan.store, "again", clan.member, 3, device_type="cpu", timeout_s=20)
        total = torch.tensor([float(10**attempt * (clan.member + 1))])
        dist.all_reduce(total, group=group)
        sums.append(total.item())
        clan.replica_group.gather_json(None)
    return sums


def test_a_group_can_be_made_again_under_its_name():
    assert run_ranks(3, _meet_again) == [[6.0, 60.0, 600.0]] * 3
