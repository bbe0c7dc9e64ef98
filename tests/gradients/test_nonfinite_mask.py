import math
import os

import pytest
import torch
import torch.distributed as dist

from clantune_scale.distributed import world
from clantune_scale.distributed.world import ClanGroups
from clantune_scale.gradients.nonfinite_mask import NonfiniteMask
from tests.ranks import run_ranks


def _mean(losses, gradients, team=(0, 1, 2)):
    """The clan's mean gradient of one pass as each rank gets it, and its non-finite counts; members of equal size."""
    rank = int(os.environ["RANK"])
    clan = world.join(3, timeout_s=30)
    dist.init_process_group("gloo")
    groups = ClanGroups(clan, "cpu")
    mask = NonfiniteMask(clan.member, 3, groups.gradient)
    if losses[rank] is not None:
        mask.observe(torch.tensor(losses[rank]))
    buckets = [torch.tensor(bucket) for bucket in gradients[rank]]
    for bucket in buckets:
        if clan.member in team:
            mask.weigh([bucket], team)
            group = groups.gradient(team)
            dist.all_reduce(bucket.div_(group.size()), group=group)
    result = [bucket.tolist() for bucket in buckets], mask.read_nonfinite_counts(), mask.read_nonfinite_counts()
    dist.barrier()
    dist.destroy_process_group()
    return result


def test_finite_members_are_averaged_as_without_a_mask():
    gradients = [[[1.5, 2.0], [0.1]], [[4.0, -1.0], [0.7]], [[0.3, 9.0], [-0.2]]]
    expected = [sum(torch.tensor(g[i]) / 3 for g in gradients) for i in range(2)]
    for means, *nonfinite_counts in run_ranks(3, _mean, [1.0, 2.0, 3.0], gradients):
        assert all(torch.allclose(torch.tensor(m), e, rtol=1e-6) for m, e in zip(means, expected, strict=True))
        assert nonfinite_counts == [0, 0]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_member_whose_loss_is_not_finite_is_left_out_of_every_sum(loss):
    gradients = [[[1.0], [5.0]], [[math.nan], [2.0]], [[3.0], [7.0]]]
    results = run_ranks(3, _mean, [1.0, loss, 3.0], gradients)
    assert [means for means, *_ in results] == [[[2.0], [6.0]]] * 3
    # The loss was counted as non-finite when it was observed.
    assert [nonfinite_counts for _, *nonfinite_counts in results] == [[0, 0]] * 3


def test_one_bad_rank_takes_its_whole_member_out():
    gradients = [[[1.0]], [[1.0]], [[4.0]], [[4.0]], [[9.0]], [[math.nan]]]
    results = run_ranks(6, _mean, [1.0, 1.0, 1.0, 1.0, 1.0, math.nan], gradients)
    assert all(means == [[2.5]] for means, *_ in results)
    assert all(nonfinite_counts == [0, 0] for _, *nonfinite_counts in results)


def test_where_no_loss_is_seen_the_first_sum_says_who_is_out():
    """As on a pipeline's first stage, to which a loss that is not finite comes as a gradient that is not."""
    gradients = [[[1.0], [5.0]], [[math.inf], [2.0]], [[3.0], [7.0]]]
    results = run_ranks(3, _mean, [None, None, None], gradients)
    assert [means for means, *_ in results] == [[[2.0], [6.0]]] * 3
    assert [nonfinite_counts for _, *nonfinite_counts in results] == [[0, 0], [1, 0], [0, 0]]


def test_a_gradient_that_turns_bad_after_the_mask_was_made_adds_nothing():
    gradients = [[[3.0], [6.0]], [[3.0], [math.inf]], [[3.0], [6.0]]]
    results = run_ranks(3, _mean, [1.0, 1.0, 1.0], gradients)
    assert all(means == [[3.0], [4.0]] for means, *_ in results)
    assert [nonfinite_counts for _, *nonfinite_counts in results] == [[0, 0], [1, 0], [0, 0]]


def test_where_nobody_is_finite_the_mean_is_zero():
    gradients = [[[math.nan]]] * 3
    assert [means for means, *_ in run_ranks(3, _mean, [math.nan] * 3, gradients)] == [[[0.0]]] * 3


def test_a_team_makes_its_own_mask():
    gradients = [[[1.0]], [[math.nan]], [[3.0]]]
    results = run_ranks(3, _mean, [1.0, math.nan, math.nan], gradients, (0, 2))
    assert results[0][0] == results[2][0] == [[1.0]]
