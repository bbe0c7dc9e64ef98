"""The finite vote: a member whose gradient is not finite is left out of the clan's mean, as a whole.

Before a backward pass's first gradient crosses members, its ranks tell each other whether their losses (and what is
known of their gradients) are finite: one all-reduce of a number per member. A member that is not adds zeros to the
sums of that pass, the mean is over the others, and it gets their mean like everyone. A gradient that turns out not to
be finite after the vote, where the loss was, adds zeros too; that one sum is then short of a term. Nothing here waits
for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist


class FiniteVote:
    """One rank's part in the votes of a run.

    Args:
        member: this rank's member.
        population_size: number of members.
        group_for: team of members to the group of all its ranks with this rank's part of the model.
        spans_parts: whether members are cut into pipeline stages or tensor shards: their ranks then agree first,
            because only some of them know the loss.
    """

    def __init__(
        self,
        member: int,
        population_size: int,
        group_for: Callable[[tuple[int, ...]], Any],
        *,
        spans_parts: bool = False,
    ) -> None:
        self._member, self._size = member, population_size
        self._group_for, self._spans_parts = group_for, spans_parts
        self._is_bad: torch.Tensor | None = None
        self._scale: torch.Tensor | None = None
        self._strikes: torch.Tensor | None = None

    def observe(self, values: torch.Tensor | Iterable[torch.Tensor]) -> None:
        """Takes in a micro-batch's loss, or gradients that are known before the vote; the next sum needs a new one."""
        for value in [values] if isinstance(values, torch.Tensor) else values:
            is_bad = ~_is_finite(value.detach())
            self._is_bad = is_bad if self._is_bad is None else self._is_bad | is_bad
        self._scale = None

    @torch.no_grad()
    def weigh(self, tensors: Sequence[torch.Tensor], team: tuple[int, ...]) -> None:
        """Makes this rank's terms of a sum over ``team``, of which the mean over the whole team is taken, in place.

        All ranks of the team call it before each sum; the first call after :meth:`observe` votes.
        """
        if not tensors:
            return
        if self._scale is None:
            self._vote(team, tensors[0].device)
        for tensor in tensors:
            is_bad = ~_is_finite(tensor)
            # Filled and not multiplied: zero times a NaN is a NaN.
            tensor.mul_(self._scale.to(tensor.dtype)).masked_fill_(is_bad | (self._scale == 0), 0)
            self._strike(is_bad & (self._scale > 0))

    def _vote(self, team: tuple[int, ...], device: torch.device) -> None:
        """Sets this rank's factor: team size over the number of finite members, or 0."""
        is_bad = torch.zeros((), dtype=torch.bool) if self._is_bad is None else self._is_bad
        is_bad = is_bad.to(device, torch.float32)
        if self._spans_parts:
            dist.all_reduce(is_bad, op=dist.ReduceOp.MAX)
        votes = torch.zeros(self._size, device=device)
        votes[self._member] = is_bad
        dist.all_reduce(votes, group=self._group_for(team))
        is_bad = votes > 0
        num_finite = len(team) - is_bad.sum()
        self._scale = torch.where(is_bad[self._member], 0.0, len(team) / num_finite.clamp(min=1))
        self._strike(is_bad[self._member])
        self._is_bad = None

    def _strike(self, is_struck: torch.Tensor) -> None:
        count = is_struck.long()
        self._strikes = count if self._strikes is None else self._strikes + count

    def read_strikes(self) -> int:
        """How often this rank's gradient was left out since the last reading; waits for the device."""
        strikes, self._strikes = self._strikes, None
        return 0 if strikes is None else int(strikes)


def _is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """[] bool, in one pass and without a mask of the tensor's size."""
    return torch.linalg.vector_norm(tensor, float("inf")).isfinite()
