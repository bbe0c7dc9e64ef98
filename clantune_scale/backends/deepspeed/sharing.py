"""Averaging gradients over the clan where DeepSpeed reduces them anyway.

ZeRO 0, 1, 2 and ``BF16_Optimizer`` all-reduce gradients in buckets over data parallelism. In the cooperative
phase that one all-reduce is given the group of all (member, data) ranks instead: the same collectives as
plain data parallelism over all ranks, and the same roundings. ZeRO 3 reduce-scatters inside the member; each
shard is then all-reduced down its column, on the stream that DeepSpeed reduces on.

The methods that are replaced are private ones of DeepSpeed 0.19 (there is no public seam);
``tests/backends/test_deepspeed_contract.py`` checks that the installed version has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from clantune_scale.backends.base import GradientGroups
from clantune_scale.errors import ConfigError

IsSharing = Callable[[], bool]


def replace_method(target: Any, name: str, method: Callable) -> Callable[[], None]:
    """Shadows ``target.name`` by an instance attribute; returns what undoes it."""
    had_own = name in vars(target)
    before = getattr(target, name)
    setattr(target, name, method)

    def restore() -> None:
        if had_own:
            setattr(target, name, before)
        else:
            delattr(target, name)

    return restore


def share(engine: Any, is_sharing: IsSharing, groups: GradientGroups, population_size: int) -> list[Callable[[], None]]:
    """Hooks ``engine``'s gradient reduction; returns what takes the hooks off again.

    Raises:
        ConfigError: for a DeepSpeed setting under which gradients are not reduced where they are averaged.
    """
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return [_share_partitions(engine.optimizer, is_sharing, groups, population_size)]
    if type(engine.optimizer).__name__ == "DeepSpeedZeroOptimizer":
        if not engine.optimizer.use_multi_rank_bucket_allreduce:
            raise ConfigError(
                "zero_optimization.use_multi_rank_bucket_allreduce is false, and then each rank reduces only what it "
                "owns, which the clan cannot average. Leave it at its default, true."
            )
        return _share_zero_buckets(engine.optimizer, is_sharing, groups, population_size)
    return [_share_engine_buckets(engine, is_sharing, groups)]


def _share_engine_buckets(engine: Any, is_sharing: IsSharing, groups: GradientGroups) -> Callable[[], None]:
    """ZeRO 0 and ``BF16_Optimizer``: the engine's own bucketed all-reduce."""
    reduce_in_member = engine.allreduce_bucket

    def allreduce_bucket(bucket: list, dp_group: Any, dp_world_size: float | None = None) -> torch.Tensor:
        if not is_sharing():
            return reduce_in_member(bucket, dp_group, dp_world_size)
        clan = groups.gradient()
        return reduce_in_member(bucket, clan, clan.size())

    return replace_method(engine, "allreduce_bucket", allreduce_bucket)


def _share_zero_buckets(
    optimizer: Any, is_sharing: IsSharing, groups: GradientGroups, population_size: int
) -> list[Callable[[], None]]:
    """ZeRO 1 and 2: the optimizer's bucketed all-reduce, and the contiguous one without ``reduce_scatter``."""
    reduce_in_member = optimizer.allreduce_bucket
    reduce_contiguous = optimizer.gradient_reduction_w_predivide

    def allreduce_bucket(bucket, communication_data_type, rank=None, log=None, divide=True, process_group=None):
        if not is_sharing():
            return reduce_in_member(
                bucket, communication_data_type, rank=rank, log=log, divide=divide, process_group=process_group
            )
        if not divide:
            # The caller divided by the member's degree; the rest is divided before the sum, so that
            # sixteen-bit sums over the clan overflow no sooner than those over the member.
            torch._foreach_div_(list(bucket), population_size)
        return reduce_in_member(
            bucket, communication_data_type, rank=rank, log=log, divide=divide, process_group=groups.gradient()
        )

    def gradient_reduction_w_predivide(tensor: torch.Tensor, communication_data_type: torch.dtype) -> torch.Tensor:
        if not is_sharing():
            return reduce_contiguous(tensor, communication_data_type)
        in_member = optimizer.dp_process_group
        optimizer.dp_process_group = groups.gradient()
        try:
            return reduce_contiguous(tensor, communication_data_type)
        finally:
            optimizer.dp_process_group = in_member

    return [
        replace_method(optimizer, "allreduce_bucket", allreduce_bucket),
        replace_method(optimizer, "gradient_reduction_w_predivide", gradient_reduction_w_predivide),
    ]


def _share_partitions(
    optimizer: Any, is_sharing: IsSharing, groups: GradientGroups, population_size: int
) -> Callable[[], None]:
    """ZeRO 3: the scattered shards, before they are added to the accumulated gradient."""
    take_partitions = optimizer.partition_grads

    @torch.no_grad()
    def partition_grads(params_to_release: list, grad_partitions: list[torch.Tensor]) -> Any:
        if is_sharing() and grad_partitions:
            flat = _flatten_dense_tensors(grad_partitions).div_(population_size)
            dist.all_reduce(flat, group=groups.column())
            grad_partitions = list(_unflatten_dense_tensors(flat, grad_partitions))
        return take_partitions(params_to_release, grad_partitions)

    return replace_method(optimizer, "partition_grads", partition_grads)
