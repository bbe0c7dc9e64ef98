"""Averaging gradients over the clan inside DeepSpeed's own gradient reduction.

ZeRO 0, 1, 2 and ``BF16_Optimizer`` all-reduce gradients in buckets over data parallelism. When members share gradients,
that all-reduce gets the group of all their (member, data) ranks instead. The collectives and the roundings are those of
plain data parallelism over these ranks. An expert's gradient uses its own expert-data group, extended to all members.
ZeRO 3 reduce-scatters inside the member. Each shard is then all-reduced over its replica group, on DeepSpeed's
reduction stream. The pipeline engine sums tied gradients over its stages first, as it does without a clan.

If DeepSpeed reduces during backward (ZeRO 1 and 2 with ``overlap_comm``, ZeRO 3), so does the clan. NCCL requires all
ranks to post collectives in the same order. This holds because each clan collective replaces one of DeepSpeed's or
directly follows it, on the same thread and stream, and DeepSpeed posts its own in the same order on all ranks.

ZeRO 0 and 1 average layer by layer: a layer that only some ranks used has zero gradients on the others. ZeRO 2, ZeRO 3
and ``overlap_comm`` reduce layers as backward comes to them. There, ranks that share gradients must run the same graph:
the same layers, frozen parameters and number of backward passes. Ranks compare what they posted once per phase.

The replaced methods are private ones of DeepSpeed 0.19, which has no public interface for this.
``tests/backends/test_deepspeed_contract.py`` checks that the installed version has them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from clantune_scale.gradients.hooks import GradientSharing, replace_method


def share(engine: Any, sharing: GradientSharing) -> list[Callable[[], None]]:
    """Hooks ``engine``'s gradient reduction.

    Returns:
        Functions that remove the hooks.
    """
    stage, check = engine.zero_optimization_stage(), _check_order(engine, sharing)
    if stage == 3:
        return [check, _share_partitions(engine.optimizer, sharing)]
    if type(engine.optimizer).__name__ == "DeepSpeedZeroOptimizer":
        return [
            check,
            _share_zero_buckets(engine.optimizer, sharing),
            _share_contiguous(engine.optimizer, sharing),
            _fill_unused(engine.optimizer, sharing),
        ]
    return [check, _share_engine_buckets(engine, sharing)]


def _check_order(engine: Any, sharing: GradientSharing) -> Callable[[], None]:
    """Before an update, compares what ranks posted: in the first step that is shared, then once per phase."""
    take_step, order = engine._take_model_step, sharing.order
    has_gradients = any(parameter.requires_grad for parameter in engine.module.parameters())

    def take_checked_step(*args: Any, **kwargs: Any) -> Any:
        team = sharing.team()
        if len(team) > 1 and has_gradients:
            group = partial(sharing.groups.replica_group, team)
            order.check_step(group, engine.device, num_steps=engine.global_steps, ends_phase=sharing.probe.is_active)
        order.end_step()
        return take_step(*args, **kwargs)

    return replace_method(engine, "_take_model_step", take_checked_step)


def _fill_unused(optimizer: Any, sharing: GradientSharing) -> Callable[[], None]:
    """ZeRO 1 packs the gradients that there are: a layer that this rank did not use gets zeros, and keeps its place."""
    reduce = optimizer.reduce_gradients

    def reduce_gradients(*args: Any, **kwargs: Any) -> Any:
        if len(sharing.team()) > 1 and not optimizer.overlap_comm:
            for parameter in (p for group in optimizer.bit16_groups for p in group if p.requires_grad):
                if optimizer.get_gradient_for_reduction(parameter) is None:
                    parameter.grad = torch.zeros_like(parameter)
                    if optimizer.use_grad_accum_attribute:
                        optimizer._fill_param_grad_accum_attribute(parameter)
        return reduce(*args, **kwargs)

    return replace_method(optimizer, "reduce_gradients", reduce_gradients)


def _parameters_in(optimizer: Any, dtype: torch.dtype) -> list[int]:
    """ZeRO 1 and 2: the numbers of the parameters whose gradients are reduced now."""
    bucket = optimizer.ipg_buckets.get(dtype)
    return [] if bucket is None else [number for _, _, number in bucket.params]


def _share_engine_buckets(engine: Any, sharing: GradientSharing) -> Callable[[], None]:
    """ZeRO 0 and ``BF16_Optimizer``: the engine's own bucketed all-reduce."""
    reduce = engine.allreduce_bucket

    def allreduce_bucket(bucket: list, dp_group: Any, dp_world_size: float | None = None) -> torch.Tensor:
        team = sharing.team()
        if len(team) == 1:
            return reduce(bucket, dp_group, dp_world_size)
        clan = sharing.across_members(team, dp_group)
        # Not the group's size: an expert's gradient is summed over fewer ranks than it is divided by.
        divisor = (dp_world_size or dist.get_world_size(dp_group)) * len(team)
        own = None
        if sharing.probe.is_active:
            # The reduction works in place, and the clan's mean still needs the bucket.
            own = reduce([gradient.clone() for gradient in bucket], dp_group, dp_world_size)
        for gradient in bucket:
            sharing.order.note("bucket", gradient)
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

    def allreduce_bucket(
        bucket: list[torch.Tensor],
        communication_data_type: torch.dtype,
        rank: int | None = None,
        log: Any = None,
        divide: bool = True,
        process_group: Any = None,
    ) -> torch.Tensor:
        options = {"rank": rank, "log": log, "divide": divide}
        team = sharing.team()
        if len(team) == 1:
            return reduce(bucket, communication_data_type, process_group=process_group, **options)
        own = None
        if sharing.probe.is_active:
            copies = [gradient.clone() for gradient in bucket]
            own = reduce(copies, communication_data_type, process_group=process_group, **options)
        for gradient in bucket:
            sharing.order.note(f"bucket {_parameters_in(optimizer, communication_data_type)}", gradient)
        sharing.groups.weigh(bucket, team)
        if not divide:
            # The caller has divided by the member's degree. Dividing by the rest before the sum keeps a 16-bit sum over
            # the clan from overflowing sooner than one over the member.
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
        sharing.order.note(f"bucket {_parameters_in(optimizer, communication_data_type)}", tensor)
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
            sharing.order.note(f"partitions {[parameter.ds_id for parameter in params_to_release]}", own)
            # In place if the probe does not need the member's own: DeepSpeed does not use the buffer again.
            mean = own.clone() if sharing.probe.is_active else own
            sharing.groups.weigh([mean], team)
            mean.div_(len(team))
            dist.all_reduce(mean, group=sharing.groups.replica_group(team))
            if sharing.probe.is_active:
                sharing.probe.compare(own, mean)
            grad_partitions = list(_unflatten_dense_tensors(mean, grad_partitions))
        return take_partitions(params_to_release, grad_partitions)

    return replace_method(optimizer, "partition_grads", partition_grads)
