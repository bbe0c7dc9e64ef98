"""A look at one step's gradients in each phase: how large, and how well a member's own agrees with the clan's.

The agreement is what selection acts on without being told: a member whose own gradient no longer points the
clan's way is not helped by it. Looking costs one more reduction inside the member, in that step alone.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist


class GradientProbe:
    """Gathers inner products while it is active; gradient hooks feed it.

    Attributes:
        is_active: whether the step that comes is looked at; changes between steps only.
        norm: the member's gradient norm before clipping, as the engine knows it; None where it does not.
    """

    def __init__(self) -> None:
        self.is_active = False
        self.norm: float | None = None
        self._sums: torch.Tensor | None = None

    @torch.no_grad()
    def compare(self, own: torch.Tensor, mean: torch.Tensor) -> None:
        """Takes in a bucket of the member's own gradient and of the clan's mean (this rank's part of both)."""
        own, mean = own.detach().flatten().float(), mean.detach().flatten().float()
        sums = torch.stack([own @ mean, own @ own, mean @ mean])
        self._sums = sums if self._sums is None else self._sums + sums

    def read_alignment(self, device: torch.device) -> float | None:
        """Cosine between the member's own gradient and the clan's mean since the last reading; a member collective.

        Ranks that hold the same part count it as often above as below the line, so that whole and sharded
        gradients alike are summed over the member. With accumulation, buckets of several micro-batches are
        compared one by one. None where nothing was compared.
        """
        sums, self._sums = self._sums, None
        # What was looked at is the same on all ranks of a member: either all take part or none does.
        if sums is None:
            return None
        sums = sums.to(device)
        dist.all_reduce(sums)
        inner, own, mean = sums.tolist()
        return inner / math.sqrt(own * mean) if own > 0 and mean > 0 else math.nan
