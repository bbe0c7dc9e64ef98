"""The clan's weighted mean of weights, shard by shard."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from clantune_scale.distributed import world
from clantune_scale.distributed.world import ClanGroups
from clantune_scale.errors import TransferError
from clantune_scale.transfer import MemberState, Transfers, average_members
from tests.backends.small_runs import ds_config, flat_weights, in_member_worlds, member_engine, train_step
from tests.ranks import run_ranks


def _train_apart_then_average(rank, config, weights, broken):
    clan, backend = member_engine(config, 2)
    for step in range(3):
        train_step(backend.engine, step, rank)
    if clan.member == broken:
        backend.masters()[0].data.fill_(float("nan"))
    before = flat_weights(backend.engine)
    moments = [tensor.clone() for name, tensor in backend.state().tensors if name.startswith("optimizer.")]
    average_members(backend.state(), weights, clan.replica_group, ClanGroups(clan, "cpu").replica_group_for)
    kept = [tensor for name, tensor in backend.state().tensors if name.startswith("optimizer.")]
    computed = torch.cat([parameter.detach().float().flatten() for parameter in backend.module.parameters()])
    return before, flat_weights(backend.engine), computed, all(map(torch.equal, moments, kept))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_all_members_take_the_weighted_mean_and_keep_their_moments(stage):
    weights = (0.25, 0.75)
    results = run_ranks(4, in_member_worlds, _train_apart_then_average, ds_config(stage), weights, None)
    expected = 0.25 * results[0][0] + 0.75 * results[2][0]
    assert not torch.equal(results[0][0], results[2][0])
    for _, after, computed, kept_moments in results:
        assert (after - expected).abs().max() < 1e-7
        assert torch.equal(computed, after) and kept_moments


def test_partitioned_weights_are_averaged_where_they_correspond():
    results = run_ranks(4, in_member_worlds, _train_apart_then_average, ds_config(3), (0.5, 0.5), None)
    expected = (results[0][0] + results[2][0]) / 2
    assert all((after - expected).abs().max() < 1e-7 for _, after, _, _ in results)


def test_a_member_without_weight_may_be_broken():
    results = run_ranks(2, in_member_worlds, _train_apart_then_average, ds_config(0), (1.0, 0.0), 1)
    assert torch.equal(results[1][1], results[0][0]) and torch.equal(results[0][1], results[0][0])


def _average_with_a_fault(is_struck: bool) -> tuple[float, str | None, str | None]:
    """A mean of three members whose sum one of them does not get right; what is said then and afterwards."""
    world.join(3)
    clan = world.current()
    transfers = Transfers(clan.replica_group, ClanGroups(clan, "cpu").replica_group_for, inside=None)
    weight = torch.full((5,), float(clan.member))
    state = MemberState([("master.0", weight)], {}, load_scalars=lambda scalars: None, refresh=lambda: None)
    reduce = dist.all_reduce

    def all_reduce(tensor: torch.Tensor, **options: object) -> None:
        reduce(tensor, **options)
        tensor[3] += 1e-6 if clan.member == 1 and is_struck else 0.0

    dist.all_reduce = all_reduce
    said = []
    for _ in range(2):
        try:
            transfers.average(state, (0.5, 0.25, 0.25), round_index=4)
            said.append(None)
        except TransferError as error:
            said.append(str(error))
    clan.replica_group.gather_json(None)
    return (float(weight[0]), *said)


@pytest.mark.parametrize("is_struck", [False, True])
def test_a_mean_that_is_not_the_same_everywhere_is_no_mean(is_struck):
    for mean, first, second in run_ranks(3, _average_with_a_fault, is_struck):
        assert mean == 0.75
        if is_struck:
            assert first.startswith("round 4: members [1] did not get the clan's mean: [(1, \"its mean is not")
            assert "Resume the run" in first and "members [1] did not get" in second
        else:
            assert first is None and second is None
