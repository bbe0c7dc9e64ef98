"""The elements of weights and gradients of any kind, as real numbers: complex, double, sparse."""

from __future__ import annotations

import torch


def real_elements(tensor: torch.Tensor) -> torch.Tensor:
    """[elements] the real numbers that a tensor holds, in its own precision, or float32 if that is less.

    A complex number counts as two, so that norms and inner products are those of the complex vectors (the real part,
    for an inner product). Dense memory is not copied if it is real and contiguous.
    """
    tensor = tensor.detach()
    dense = tensor.to_dense() if tensor.is_sparse else tensor
    real = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
    flat = real.reshape(-1)
    return flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat


def stored_values(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a gradient's elements: a sparse one's values, which may name an element several times."""
    return tensor._values() if tensor.is_sparse else tensor
