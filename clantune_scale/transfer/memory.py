"""The memory of a tensor, whatever order its elements lie in: channels last, transposed, a slice, expanded."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def memory_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """One-dimensional views that together hold each element of a tensor in the order of its memory.

    Two tensors of one shape and equal strides give the same views. An expanded dimension counts once: its elements are
    one element.
    """
    tensor = tensor.detach()
    if not tensor.numel():
        return
    if tensor.is_contiguous():
        yield tensor.view(-1)
        return
    for axis, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(axis, 0, 1)
    strides = tensor.stride()
    # Dense memory in another order is contiguous once its axes are sorted; a slice has gaps, and is taken row by row.
    tensor = tensor.permute(sorted(range(tensor.dim()), key=lambda axis: (tensor.size(axis) == 1, -strides[axis])))
    if tensor.is_contiguous():
        yield tensor.view(-1)
        return
    for row in tensor.unbind(0):
        yield from memory_of(row)


def order_of(tensor: torch.Tensor) -> list[int]:
    """The strides of a tensor whose memory is not in the order of its axes; empty for all others."""
    return [] if tensor.is_contiguous() else list(tensor.stride())
