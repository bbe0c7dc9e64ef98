"""Which elements of which weights each of DeepSpeed's shards holds, for a resume on another number of ranks.

ZeRO 1, 2 and ``BF16_Optimizer`` split a padded flat group into equal parts. ZeRO 3 splits each parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from clantune_scale.transfer.state import Piece


def master_pieces(engine: Any, masters: Sequence[torch.Tensor]) -> list[list[Piece]] | None:
    """The pieces of each master; None if the order of weights depends on the number of ranks.

    Args:
        engine: DeepSpeed's.
        masters: this rank's fp32 weights, in the order of the optimizer's groups.
    """
    optimizer = engine.optimizer
    kind = type(optimizer).__name__
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        return _of_partitions(engine)
    if kind == "DeepSpeedZeroOptimizer":
        if optimizer.round_robin_gradients:
            return None
        return _of_parts(masters, optimizer.bit16_groups, optimizer.real_dp_process_group)
    if kind == "BF16_Optimizer":
        return _of_parts(masters, optimizer.bf16_groups, optimizer.real_dp_process_group)
    return [whole(f"master.{index}", master) for index, master in enumerate(masters)]


def whole(key: str, tensor: torch.Tensor) -> list[Piece]:
    """The piece of a tensor that every rank holds whole."""
    return [Piece(key, 0, 0, tensor.numel())]


def frozen_pieces(name: str, parameter: torch.nn.Parameter) -> list[Piece]:
    """The pieces of a frozen parameter, which ZeRO 3 splits too."""
    if hasattr(parameter, "ds_tensor"):
        return [_of_partition(f"frozen.{name}", parameter, offset=0)]
    return whole(f"frozen.{name}", parameter)


def _of_parts(
    masters: Sequence[torch.Tensor], groups: Sequence[Any], process_groups: Sequence[Any]
) -> list[list[Piece]]:
    found = []
    for index, (master, group) in enumerate(zip(masters, groups, strict=True)):
        total = sum(parameter.numel() for parameter in group)
        start = dist.get_rank(process_groups[index]) * master.numel()
        found.append([Piece(f"group.{index}", start, 0, max(0, min(master.numel(), total - start)))])
    return found


def _of_partitions(engine: Any) -> list[list[Piece]]:
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    found = []
    for group in engine.optimizer.fp16_groups:
        pieces, offset = [], 0
        for parameter in group:
            pieces.append(_of_partition(names[id(parameter)], parameter, offset=offset))
            offset += parameter.ds_tensor.ds_numel
        found.append(pieces)
    return found


def _of_partition(key: str, parameter: Any, *, offset: int) -> Piece:
    size = parameter.ds_tensor.ds_numel
    start = dist.get_rank(parameter.ds_process_group) * size
    return Piece(key, start, offset, max(0, min(size, parameter.ds_numel - start)))
