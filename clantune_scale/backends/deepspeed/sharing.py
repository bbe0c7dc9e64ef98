"""Averaging gradients over the clan where DeepSpeed reduces them anyway.

ZeRO 0, 1, 2 and ``BF16_Optimizer`` all-reduce gradients in buckets over data parallelism. Where members
share, that one all-reduce is given the group of all their (member, data) ranks instead: the same collectives as
plain data parallelism over those ranks, and the same roundings. An expert's gradient goes over its own
expert-data group in every member. ZeRO 3 reduce-scatters inside the member; each shard is then all-reduced down
its column, on the stream that DeepSpeed reduces on. The pipeline engine sums tied gradients over its stages
first, by itself, as it does without a clan.

Where DeepSpeed reduces during backward (ZeRO 1 and 2 with ``overlap_comm``, ZeRO 3), so does the clan. The ordering
rule that NCCL asks for holds because nothing is posted anywhere else: each clan collective is posted in the place of
one of DeepSpeed's or right after it, by the thread and on the stream that posted that one, and DeepSpeed posts its
own in one order on all ranks. Ranks that share must therefore run the same graph: the same layers, frozen parameters
and number of backward passes. ``tests/backends/test_deepspeed_overlap.py`` compares the order over ranks.

The methods that are replaced are private ones of DeepSpeed 0.19 (there is no public seam);
``tests/backends/test_deepspeed_contract.py`` checks that the installed version has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from clantune_scale.gradients.hooks import GradientSharing, replace_method


def share(engine: Any, sharing: GradientSharing) -> list[Callable[[], None]]:
    """Hooks ``engine``'s gradient reduction; returns what takes the hooks off again."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return [_share_partitions(engine.optimizer, sharing)]
    if type(engine.optimizer).__name__ == "DeepSpeedZeroOptimizer":
        return [_share_zero_buckets(engine.optimizer, sharing), _share_contiguous(engine.optimizer, sharing)]
    return [_share_engine_buckets(engine, sharing)]


def _share_engine_buckets(engine: Any, sharing: GradientSharing) -> Callable[[], None]:
    """ZeRO 0 and ``BF16_Optimizer``: the engine's own bucketed all-reduce."""
    reduce = engine.allreduce_bucket

    def allreduce_bucket(bucket: list, dp_group: Any, dp_world_size: float | None = None) -> torch.Tensor:
        team = sharing.team()
        if len(team) == 1:
            return reduce(bucket, dp_group, dp_world_size)
        clan = sharing.across_members(team, dp_group)
        # Not the clan's size: expert gradients are summed over fewer ranks than they are divided by.
        divisor = (dp_world_size or dist.get_world_size(dp_group)) * len(team)
        own = None
        if sharing.probe.is_active:
            own = reduce([gradient.clone() for gradient in bucket], dp_group, dp_world_size)
        sharing.groups.weigh(bucket, team)
        mean = reduce(bucket, clan, divisor)
        if own is None:
            return mean
        sharing.probe.compare(own, mean)
        return mean

    return replace_method(engine, "allreduce_bucket", allreduce_bucket)


def _share_zero_buckets(optimizer: Any, sharing: GradientSharing) -> Callable[[], None]:
    """ZeRO 1 and 2: the optimizer's bucketed all-reduce."""
    reduce = optimizer.allreduce_bucket

    def allreduce_bucket(bucket, communication_data_type, rank=None, log=None, divide=True, process_group=None):
        options = {"rank": rank, "log": log, "divide": divide}
        team = sharing.team()
        if len(team) == 1:
            return reduce(bucket, communication_data_type, process_group=process_group, **options)
        own = None
        if sharing.probe.is_active:
            copies = [gradient.clone() for gradient in bucket]
            own = reduce(copies, communication_data_type, process_group=process_group, **options)
        sharing.groups.weigh(bucket, team)
        if not divide:
            # The caller divided by the member's degree; the rest is divided before the sum, so that
            # sixteen-bit sums over the clan overflow no sooner than those over the member.
            torch._foreach_div_(list(bucket), len(team))
        clan = sharing.across_members(team, process_group or optimizer.dp_process_group)
        mean = reduce(bucket, communication_data_type, process_group=clan, **options)
        if own is not None:
            sharing.probe.compare(own, mean)
        return mean

    return replace_method(optimizer, "allreduce_bucket", allreduce_bucket)


def _share_contiguous(optimizer: Any, sharing: GradientSharing) -> Callable[[], None]:
    """ZeRO 1 and 2 without ``reduce_scatter``: one all-reduce of the contiguous bucket."""
    reduce = optimizer.gradient_reduction_w_predivide

    def gradient_reduction_w_predivide(tensor: torch.Tensor, communication_data_type: torch.dtype) -> torch.Tensor:
        team = sharing.team()
        if len(team) == 1:
            return reduce(tensor, communication_data_type)
        own = reduce(tensor.clone(), communication_data_type) if sharing.probe.is_active else None
        sharing.groups.weigh([tensor], team)
        in_member = optimizer.dp_process_group
        optimizer.dp_process_group = sharing.across_members(team, in_member)
        try:
            mean = reduce(tensor, communication_data_type)
        finally:
            optimizer.dp_process_group = in_member
        if own is not None:
            sharing.probe.compare(own, mean)
        return mean

    return replace_method(optimizer, "gradient_reduction_w_predivide", gradient_reduction_w_predivide)


def _share_partitions(optimizer: Any, sharing: GradientSharing) -> Callable[[], None]:
    """ZeRO 3: the scattered shards, before they are added to the accumulated gradient."""
    take_partitions = optimizer.partition_grads

    @torch.no_grad()
    def partition_grads(params_to_release: list, grad_partitions: list[torch.Tensor]) -> Any:
        team = sharing.team()
        if len(team) > 1 and grad_partitions:
            own = _flatten_dense_tensors(grad_partitions)
            # In place where nobody looks at the member's own: it is a buffer of DeepSpeed's that is spent here.
            mean = own.clone() if sharing.probe.is_active else own
            sharing.groups.weigh([mean], team)
            mean.div_(len(team))
            dist.all_reduce(mean, group=sharing.groups.replica_group(team))
            if sharing.probe.is_active:
                sharing.probe.compare(own, mean)
            grad_partitions = list(_unflatten_dense_tensors(mean, grad_partitions))
        return take_partitions(params_to_release, grad_partitions)

    return replace_method(optimizer, "partition_grads", partition_grads)
