"""Layers of many models at once, over tensors [models, samples, features]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional


def affine(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """[models, samples, out], from ``weight`` [models, in, out] and ``bias`` [models, out]."""
    return torch.baddbmm(bias.unsqueeze(1), inputs, weight)


def embed(table: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[models, ..., width], from each model's ``table`` [models, tokens, width] at ``tokens`` [models, ...]."""
    models, num_tokens, width = table.shape
    offsets = (torch.arange(models) * num_tokens).view(-1, *[1] * (tokens.dim() - 1))
    return functional.embedding(tokens + offsets, table.reshape(models * num_tokens, width))


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """``labels``'s shape, from ``logits`` [*labels, classes]."""
    losses = functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return losses.view(labels.shape)


def normal_parameters(seed: int, shapes: Sequence[tuple[tuple[int, ...], float]]) -> list[torch.Tensor]:
    """Normal parameters of each (shape, standard deviation); a deviation of 0 gives zeros."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return [scale * torch.randn(shape, generator=generator) for shape, scale in shapes]
