"""Diagnostics of one step's gradients in each phase: the norm, and the alignment with the clan's mean.

The alignment is the cosine between a member's own gradient and the clan's mean. A member with a low alignment gains
little from cooperation, and selection acts on the result. The probe costs one more reduction inside the member, in
the probed step only.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from clantune_scale.gradients.elements import real_elements


class GradientProbe:
    """Sums inner products of gradients while it is active. The gradient hooks feed it.

    Attributes:
        is_active: whether the next step is probed. It changes between steps only.
        norm: the member's gradient norm before clipping, as the engine reports it; None if the engine reports none.
    """

    def __init__(self) -> None:
        self.is_active = False
        self.norm: float | None = None
        self._sums: torch.Tensor | None = None

    @torch.no_grad()
    def compare(self, own: torch.Tensor, mean: torch.Tensor) -> None:
        """Adds one bucket.

        Args:
            own: the member's own gradient (this rank's part).
            mean: the clan's mean, of the same shape.
        """
        # The sums stay on the device: reading them here would block the backward pass.
        own, mean = real_elements(own), real_elements(mean)
        sums = torch.stack([own @ mean, own @ own, mean @ mean])
        self._sums = sums if self._sums is None else self._sums + sums

    def read_alignment(self, device: torch.device) -> float | None:
        """[-1, 1] the cosine between the member's own gradient and the clan's mean since the last call.

        This is a member collective. The sum runs over all ranks of the member, for sharded and for whole gradients:
        a part that several ranks hold counts equally often in the numerator and in the denominator. With
        accumulation, the buckets of each micro-batch are compared separately. None if nothing was compared.
        """
        sums, self._sums = self._sums, None
        # All ranks of a member compared the same buckets, so they all leave here or none does.
        if sums is None:
            return None
        sums = sums.to(device)
        dist.all_reduce(sums)
        inner, own, mean = sums.tolist()
        return inner / math.sqrt(own * mean) if own > 0 and mean > 0 else math.nan
