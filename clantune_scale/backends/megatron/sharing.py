"""Averaging gradients over the clan inside Megatron-core's own gradient reduction.

Its ``DistributedDataParallel`` all-reduces buckets over data parallelism, overlapping with backward if
``overlap_grad_reduce`` is on. When members share gradients, that all-reduce gets the group of all their (member, data)
ranks instead. The collectives and the roundings are those of plain data parallelism over these ranks. Megatron then
sums the gradients of tied embeddings and of sequence-parallel norms inside the member, as it does without a clan.

With the distributed optimizer, Megatron reduce-scatters inside the member. With ``calculate_per_token_loss``, it
divides by the member's tokens at the end. In these two cases the finished gradient (this rank's shard with the
distributed optimizer) is averaged over the replica group, after ``config.finalize_model_grads_func``.

NCCL requires all ranks to post collectives in the same order. This holds because each clan collective replaces one of
Megatron's or follows the last of them, and Megatron posts its own in the same order on all ranks. Ranks that share
gradients must therefore run the same graph: the same layers, frozen parameters and number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from clantune_scale.gradients.hooks import GradientGroups, GradientSharing, replace_method


def share(model: Any, config: Any, sharing: GradientSharing) -> list[Callable[[], None]]:
    """Hooks the reduction of a model's gradients.

    Args:
        model: Megatron's ``DistributedDataParallel``.
        config: its ``TransformerConfig``.
        sharing: what the hooks read.

    Returns:
        Functions that remove the hooks.
    """
    reductions = model.bucket_groups + model.expert_parallel_bucket_groups
    if model.ddp_config.use_distributed_optimizer or config.calculate_per_token_loss:
        return [_share_finished(config, reductions, sharing)]
    return [undo for buckets in reductions for undo in _share_reduction(buckets, sharing)]


def _share_reduction(buckets: Any, sharing: GradientSharing) -> list[Callable[[], None]]:
    """Hooks one group of buckets. Its all-reduce may still run when ``start_grad_sync`` returns."""
    start, finish = buckets.start_grad_sync, buckets.finish_grad_sync
    own: list[torch.Tensor] = []

    def start_grad_sync(force_all_reduce: bool | None = False) -> None:
        team = sharing.team()
        # With a handle the reduction is under way already, and Megatron only waits for it.
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
    """A reduction that starts inside uses one group of the same ranks in all members of the team."""
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
    """Each bucket's gradient, reduced inside the member only. The buckets stay unchanged."""
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
    """Hooks the member's finished gradients, after Megatron has finalized them."""
    finalize = config.finalize_model_grads_func

    @torch.no_grad()
    def finalize_model_grads(*args: Any, **kwargs: Any) -> Any:
        result = finalize(*args, **kwargs)
        team = sharing.team()
        if len(team) > 1:
            for mine in _owned(reductions):
                own = mine.clone() if sharing.probe.is_active else None
                sharing.groups.weigh([mine], team)
                # Divided first, so that a 16-bit sum over the clan overflows no sooner than one over the member.
                dist.all_reduce(mine.div_(len(team)), group=sharing.groups.replica_group(team))
                if own is not None:
                    sharing.probe.compare(own, mine)
        return result

    return replace_method(config, "finalize_model_grads_func", finalize_model_grads)


def _owned(reductions: Sequence[Any]) -> Iterator[torch.Tensor]:
    """The gradients that this rank's update uses: whole buckets, or its shards with the distributed optimizer."""
    for buckets in reductions:
        for bucket in buckets.buckets:
            if not buckets.ddp_config.use_distributed_optimizer:
                yield bucket.grad_data
                continue
            group = buckets.intra_distributed_optimizer_instance_group
            yield bucket.grad_data.chunk(group.size())[group.rank()]
