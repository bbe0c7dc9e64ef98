from __future__ import annotations

import torch
import torch.distributed as dist

from clantune_scale.distributed import world
from clantune_scale.distributed.groups import stand_alone_group
from tests.ranks import run_ranks


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
