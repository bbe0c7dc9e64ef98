"""Gradient norms and clipping for models whose parameters lie on different meshes: some on (dp), others on (dp, tp).

torch's ``clip_grad_norm_`` stacks the norms of all gradients and refuses tensors of different meshes. Here each rank
sums the squares of its own shards. The sums are then added over the mesh dimensions that a gradient is sharded over.
A dimension over which the gradient is replicated counts once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from clantune_scale.gradients.elements import stored_values


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a DTensor, sharing its memory; any other tensor as it is. Both without autograd."""
    with torch.no_grad():
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return part.detach()


@torch.no_grad()
def total_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """[] the 2-norm of all gradients, equal on every rank of the member (a member collective).

    It is float32, or float64 if any gradient is.

    Args:
        parameters: the same on every rank of the member, in the same order.
    """
    squares: dict[tuple[Any, ...], torch.Tensor] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and gradient.is_sparse:
            gradient = gradient.coalesce().values()
        if gradient is not None:
            groups = _sharded_over(gradient)
            # Half precision is summed in float32; doubles and complex numbers have a precise norm of their own.
            is_half = gradient.dtype in (torch.float16, torch.bfloat16)
            values = _values(local(gradient))
            square = torch.linalg.vector_norm(values, dtype=torch.float32 if is_half else None).square()
            squares[groups] = squares[groups] + square if groups in squares else square
    total = torch.zeros(())
    # One all-reduce for each set of groups and not one for each parameter.
    for groups, square in squares.items():
        for group in groups:
            dist.all_reduce(square, group=group)
        total = total.to(square.device) + square
    return total.sqrt()


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scales all gradients so that their common norm is at most ``max_norm`` (a member collective).

    Args:
        parameters: the same on every rank of the member, in the same order.
        max_norm: the threshold; 0 turns clipping off.

    Returns:
        [] the norm before clipping, from :func:`total_norm`.
    """
    parameters = list(parameters)
    norm = total_norm(parameters)
    gradients = [stored_values(local(parameter.grad)) for parameter in parameters if parameter.grad is not None]
    if max_norm > 0 and gradients:
        # torch's own formula. The clamp keeps the comparison on the device.
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_([gradient for gradient in gradients if not gradient.is_sparse], factor)
        for gradient in gradients:
            if gradient.is_sparse:
                gradient._values().mul_(factor)
    return norm


def _values(gradient: torch.Tensor) -> torch.Tensor:
    """All elements that may differ from 0. A sparse gradient may have a row several times, which are to be summed."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _sharded_over(gradient: torch.Tensor) -> tuple[Any, ...]:
    """The groups of the mesh dimensions over which a gradient is sharded."""
    if not isinstance(gradient, DTensor):
        return ()
    mesh = gradient.device_mesh
    # FSDP2 under tensor parallelism uses a private placement (_StridedShard), which is a shard as well.
    return tuple(mesh.get_group(axis) for axis, place in enumerate(gradient.placements) if not place.is_replicate())
