"""The finite vote: a member whose gradient is not finite is left out of the clan's mean, as a whole.

With a backward pass's first sum over members, the ranks tell each other whether their losses and what they bring to
that sum are finite: one all-reduce of a number per member. A member that is not adds zeros to the sums of that pass,
the mean is over the others, and it gets their mean like everyone. A gradient that turns out not to be finite after
the vote adds zeros too; that one sum is then short of a term. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist


class NonfiniteMask:
    """One rank's part in the votes of a run.

    Args:
        member: this rank's member.
        population_size: number of members.
        group_for: team of members to the group of all its ranks with this rank's part of the model. Pipeline stages
            vote each for itself: waiting for each other in the middle of a backward pass, they would wait for ever.
    """

    def __init__(self, member: int, population_size: int, group_for: Callable[[tuple[int, ...]], Any]) -> None:
        self._member, self._size, self._group_for = member, population_size, group_for
        self._is_bad: torch.Tensor | None = None
        self._scale: torch.Tensor | None = None
        self._nonfinite_counts: torch.Tensor | None = None

    def observe(self, loss: Any) -> None:
        """Takes in a micro-batch's loss, where it is a tensor; the next sum needs a new vote."""
        if isinstance(loss, torch.Tensor):
            is_bad = ~_is_finite(loss.detach())
            self._is_bad = is_bad if self._is_bad is None else self._is_bad | is_bad
        self._scale = None

    def end_step(self) -> None:
        """An optimizer step is done: what was seen in it counts no more."""
        self._is_bad = self._scale = None

    @torch.no_grad()
    def weigh(self, tensors: Sequence[torch.Tensor], team: tuple[int, ...]) -> None:
        """Makes this rank's terms of a sum over ``team``, of which the mean over the whole team is taken, in place.

        All ranks of the team call it before each sum; the first call of a step, and after a loss, votes.
        """
        if not tensors:
            return
        if self._scale is None:
            self._mask(tensors, team)
        for tensor in tensors:
            is_bad = ~_is_finite(tensor)
            # Filled and not multiplied: zero times a NaN is a NaN.
            tensor.mul_(self._scale.to(tensor.dtype)).masked_fill_(is_bad | (self._scale == 0), 0)
            self._count_nonfinite(is_bad & (self._scale > 0))

    def _mask(self, tensors: Sequence[torch.Tensor], team: tuple[int, ...]) -> None:
        """Sets this rank's factor: team size over the number of finite members, or 0."""
        device = tensors[0].device
        is_bad = ~torch.stack([_is_finite(tensor) for tensor in tensors]).all()
        if self._is_bad is None:
            self._count_nonfinite(is_bad)
        else:
            has_bad_loss = self._is_bad.to(device)
            self._count_nonfinite(is_bad & ~has_bad_loss)
            is_bad = is_bad | has_bad_loss
        masks = torch.zeros(self._size, device=device)
        masks[self._member] = is_bad
        dist.all_reduce(masks, group=self._group_for(team))
        is_out = masks > 0
        num_finite = len(team) - is_out.sum()
        self._scale = torch.where(is_out[self._member], 0.0, len(team) / num_finite.clamp(min=1))
        self._is_bad = None

    def _count_nonfinite(self, is_nonfinite: torch.Tensor) -> None:
        count = is_nonfinite.long()
        self._nonfinite_counts = count if self._nonfinite_counts is None else self._nonfinite_counts + count

    def read_nonfinite_counts(self) -> int:
        """How often a gradient of this rank's was not finite though its loss was, since the last reading.

        It waits for the device.
        """
        nonfinite_counts, self._nonfinite_counts = self._nonfinite_counts, None
        return 0 if nonfinite_counts is None else int(nonfinite_counts)


def _is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """[] bool, in one pass and without a mask of the tensor's size."""
    return torch.linalg.vector_norm(tensor, float("inf")).isfinite()
