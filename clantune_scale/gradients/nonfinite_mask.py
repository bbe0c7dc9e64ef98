"""The non-finite mask: a member whose gradient is not finite is left out of the clan's mean, as a whole.

The mask is made with the first sum over members of each backward pass. The ranks tell each other whether their losses
and their terms of that sum are finite, by one all-reduce of one number per member. A masked member adds zeros to the
sums of that pass. The mean is over the other members, and the masked member receives it like everyone.

A gradient that becomes non-finite after the mask was made adds zeros too. That sum is then short of one term. Nothing
here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from clantune_scale.gradients.elements import stored_values


class NonfiniteMask:
    """One rank's mask, made anew for each backward pass.

    Args:
        member: this rank's member.
        population_size: number of members.
        group_for: maps a team of members to the group of all its ranks that hold this rank's part of the model. Each
            pipeline stage makes its own mask: stages that waited for each other inside a backward pass would deadlock.
    """

    def __init__(self, member: int, population_size: int, group_for: Callable[[tuple[int, ...]], Any]) -> None:
        self._member, self._size, self._group_for = member, population_size, group_for
        self._is_bad: torch.Tensor | None = None
        self._scale: torch.Tensor | None = None
        self._nonfinite_counts: torch.Tensor | None = None

    def observe(self, loss: Any) -> None:
        """Takes in a micro-batch's loss, if it is a tensor. The next sum makes a new mask."""
        if isinstance(loss, torch.Tensor):
            is_bad = ~_is_finite(loss.detach())
            self._is_bad = is_bad if self._is_bad is None else self._is_bad | is_bad
        self._scale = None

    def end_step(self) -> None:
        """Forgets the losses and the mask of the optimizer step that has ended."""
        self._is_bad = self._scale = None

    @torch.no_grad()
    def weigh(self, tensors: Sequence[torch.Tensor], team: tuple[int, ...]) -> None:
        """Scales this rank's terms of a sum over ``team`` in place, so that a division by its size gives the mean.

        All ranks of the team call it before each sum. The first call of a step, and the first one after a loss, makes
        the mask.

        Args:
            tensors: this rank's terms.
            team: the members that share gradients.
        """
        if not tensors:
            return
        if self._scale is None:
            self._scale = self._make_mask(tensors, team)
        for tensor in map(stored_values, tensors):
            # Asked again for every tensor: a gradient can become non-finite after the mask was made.
            is_bad = ~_is_finite(tensor)
            # masked_fill_, because zero times NaN is NaN.
            tensor.mul_(self._scale.to(tensor.dtype)).masked_fill_(is_bad | (self._scale == 0), 0)
            # A masked member's gradient was counted with its loss or with the mask.
            self._count_nonfinite(is_bad & (self._scale > 0))

    def _make_mask(self, tensors: Sequence[torch.Tensor], team: tuple[int, ...]) -> torch.Tensor:
        """[] float32: this rank's factor: team size over the number of finite members, or 0 if it is masked."""
        device = tensors[0].device
        is_bad = ~torch.stack([_is_finite(tensor) for tensor in tensors]).all()
        if self._is_bad is None:
            self._count_nonfinite(is_bad)
        else:
            # LossMeter counts non-finite losses. A gradient counts here only if its loss was finite.
            has_bad_loss = self._is_bad.to(device)
            self._count_nonfinite(is_bad & ~has_bad_loss)
            is_bad = is_bad | has_bad_loss
        # One slot per member: a sum over the member's ranks is above 0 if any of them is non-finite.
        masks = torch.zeros(self._size, device=device)
        masks[self._member] = is_bad
        dist.all_reduce(masks, group=self._group_for(team))
        is_out = masks > 0
        num_finite = len(team) - is_out.sum()
        self._is_bad = None
        # The callers divide by the team's size. torch.where keeps the decision on the device.
        return torch.where(is_out[self._member], 0.0, len(team) / num_finite.clamp(min=1))

    def _count_nonfinite(self, is_nonfinite: torch.Tensor) -> None:
        count = is_nonfinite.long()
        self._nonfinite_counts = count if self._nonfinite_counts is None else self._nonfinite_counts + count

    def read_nonfinite_counts(self) -> int:
        """The number of this rank's gradients since the last call that were not finite although their loss was.

        This waits for the device.
        """
        nonfinite_counts, self._nonfinite_counts = self._nonfinite_counts, None
        return 0 if nonfinite_counts is None else int(nonfinite_counts)


def _is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """[] bool, in one pass over the tensor and without a temporary of its size."""
    values = stored_values(tensor)
    if not values.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    return torch.linalg.vector_norm(values, float("inf")).isfinite()
