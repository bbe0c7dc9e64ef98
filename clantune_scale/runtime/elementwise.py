"""Elementwise sums of large tensors, a piece at a time: their intermediate results then take little memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

#: Elements of a piece: 16 MiB in fp32. Under ZeRO, one tensor is a rank's whole shard of a parameter group.
PIECE = 1 << 22


def summing_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The type to add up in: float32 for half precision, the tensor's own for all others."""
    return torch.float32 if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.dtype


def in_pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views of matching elements, without autograd.

    Args:
        tensors: of one shape. If one of them is not contiguous, they come as they are.

    Yields:
        A part of each, with at most :data:`PIECE` elements.
    """
    tensors = tuple(tensor.detach() for tensor in tensors)
    size = tensors[0].numel()
    if size <= PIECE or not all(tensor.is_contiguous() for tensor in tensors):
        yield tensors
        return
    flat = [tensor.view(-1) for tensor in tensors]
    for start in range(0, size, PIECE):
        yield tuple(tensor[start : start + PIECE] for tensor in flat)
