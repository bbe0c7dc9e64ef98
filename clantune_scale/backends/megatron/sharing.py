"""Averaging gradients over the clan where Megatron-core reduces them anyway.

Its ``DistributedDataParallel`` all-reduces buckets over data parallelism, overlapping with backward where
``overlap_grad_reduce`` is on. Where members share, that one all-reduce is given the group of all their
(member, data) ranks instead: the same collectives as plain data parallelism over those ranks, and the same
roundings. Megatron sums the gradients of tied embeddings and of sequence-parallel norms afterwards, inside the
member, as it does without a clan.

With the distributed optimizer it reduce-scatters inside the member, and with ``calculate_per_token_loss`` it
divides by the member's tokens at the end: there the finished gradient (of the distributed optimizer this rank's
shard) is averaged down the column, after ``config.finalize_model_grads_func``.

The ordering rule that NCCL asks for holds because nothing is posted anywhere else: each clan collective is posted in
the place of one of Megatron's, or after the last of them, and Megatron posts its own in one order on all ranks.
Ranks that share must therefore run the same graph: the same layers, frozen parameters and number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from clantune_scale.gradients.hooks import GradientSharing, replace_method
from clantune_scale.runtime.engine_protocol import GradientGroups


def share(model: Any, config: Any, sharing: GradientSharing) -> list[Callable[[], None]]:
    """Hooks the reduction of a model's gradients.

    Args:
        model: Megatron's ``DistributedDataParallel``.
        config: its ``TransformerConfig``.
        sharing: what the hooks read.

    Returns:
        What takes the hooks off again.
    """
    reductions = model.bucket_groups + model.expert_parallel_bucket_groups
    if model.ddp_config.use_distributed_optimizer or config.calculate_per_token_loss:
        return [_share_finished(config, reductions, sharing)]
    return [undo for buckets in reductions for undo in _share_reduction(buckets, sharing)]


def _share_reduction(buckets: Any, sharing: GradientSharing) -> list[Callable[[], None]]:
    """One group of buckets, whose all-reduce may still be under way when ``start_grad_sync`` returns."""
    start, finish = buckets.start_grad_sync, buckets.finish_grad_sync
    own: list[torch.Tensor] = []

    def start_grad_sync(force_all_reduce: bool | None = False) -> None:
        team = sharing.team()
        if len(team) == 1 or buckets.grad_reduce_handle is not None:
            return start(force_all_reduce)
        if sharing.probe.is_active:
            own.extend(_member_means(buckets))
        sharing.groups.weigh([bucket.grad_data for bucket in buckets.buckets], team)
        with _across_members(buckets, sharing.groups, team):
            return start(force_all_reduce)

    def finish_grad_sync(force_all_reduce: bool | None = False) -> None:
        finish(force_all_reduce)
        if own:
            for mine, bucket in zip(own, buckets.buckets, strict=True):
                sharing.probe.compare(mine, bucket.grad_data)
            own.clear()

    return [
        replace_method(buckets, "start_grad_sync", start_grad_sync),
        replace_method(buckets, "finish_grad_sync", finish_grad_sync),
    ]


@contextmanager
def _across_members(buckets: Any, groups: GradientGroups, team: tuple[int, ...]) -> Iterator[None]:
    """Inside, a reduction that starts goes over its group's like in all members of the team."""
    inside = buckets.data_parallel_group
    factors = [bucket.gradient_scaling_factor for bucket in buckets.buckets]
    buckets.data_parallel_group = groups.across_members(team, dist.get_process_group_ranks(inside))
    if not buckets.ddp_config.average_in_collective:
        for bucket in buckets.buckets:
            bucket.gradient_scaling_factor /= len(team)
    try:
        yield
    finally:
        buckets.data_parallel_group = inside
        for bucket, factor in zip(buckets.buckets, factors, strict=True):
            bucket.gradient_scaling_factor = factor


def _member_means(buckets: Any) -> list[torch.Tensor]:
    """Each bucket's gradient, reduced inside the member alone; the buckets stay as they are."""
    averages = buckets.ddp_config.average_in_collective
    means = []
    for bucket in buckets.buckets:
        mean = bucket.grad_data * bucket.gradient_scaling_factor
        dist.all_reduce(
            mean, op=dist.ReduceOp.AVG if averages else dist.ReduceOp.SUM, group=buckets.data_parallel_group
        )
        means.append(mean)
    return means


def _share_finished(config: Any, reductions: Sequence[Any], sharing: GradientSharing) -> Callable[[], None]:
    """The member's finished gradients, once Megatron is done with them."""
    finalize = config.finalize_model_grads_func

    @torch.no_grad()
    def finalize_model_grads(*args: Any, **kwargs: Any) -> Any:
        result = finalize(*args, **kwargs)
        team = sharing.team()
        if len(team) > 1:
            for mine in _owned(reductions):
                own = mine.clone() if sharing.probe.is_active else None
                sharing.groups.weigh([mine], team)
                # Divided first: a sum of sixteen-bit gradients overflows no sooner than the member's own.
                dist.all_reduce(mine.div_(len(team)), group=sharing.groups.replica_group(team))
                if own is not None:
                    sharing.probe.compare(own, mine)
        return result

    return replace_method(config, "finalize_model_grads_func", finalize_model_grads)


def _owned(reductions: Sequence[Any]) -> Iterator[torch.Tensor]:
    """What this rank updates weights from: whole buckets, or with the distributed optimizer its shard of each."""
    for buckets in reductions:
        for bucket in buckets.buckets:
            if not buckets.ddp_config.use_distributed_optimizer:
                yield bucket.grad_data
                continue
            group = buckets.intra_distributed_optimizer_instance_group
            yield bucket.grad_data.chunk(group.size())[group.rank()]
