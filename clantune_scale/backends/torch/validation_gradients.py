"""Gradients of validation losses in a plain loop, without touching those that the loop holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from clantune_scale.backends.torch import state
from clantune_scale.errors import EvaluationError

#: Why a loop with a loss scale has no gradients of validation losses.
SCALED = "this loop scales its loss, without which gradients in half precision underflow"
#: (batch, evaluate) to the loss, with its graph.
LossOf = Callable[[Any, Callable[[Any, Any], Any] | None], torch.Tensor]


class ReplicaGradients:
    """Every rank holds the whole model: its gradients are of its own batches, and no gradient crosses ranks.

    Args:
        loss_of: the loss on a batch.
        parameters: that train.
        dp_group, dp_size: the ranks that share the window out: rank r has batches r, r + dp_size, ...
        ddp: the wrapper of the model; None if there is none.
    """

    def __init__(
        self,
        loss_of: LossOf,
        parameters: Sequence[torch.Tensor],
        *,
        dp_group: Any,
        dp_size: int,
        ddp: DistributedDataParallel | None = None,
    ) -> None:
        self._loss_of, self._parameters, self._ddp = loss_of, parameters, ddp
        self._dp_group, self._dp_size = dp_group, dp_size

    def of_batch(self, batch: Any, evaluate: Callable[[Any, Any], Any] | None) -> Sequence[torch.Tensor | None]:
        with torch.enable_grad():
            loss = differentiable(self._loss(batch, evaluate))
            # Not backward(): neither the loop's gradients nor DDP's hooks see this.
            return torch.autograd.grad(loss, self._parameters, allow_unused=True)

    def joined(self, mine: torch.Tensor) -> torch.Tensor:
        if self._dp_size == 1:
            return mine
        parts = [torch.empty_like(mine) for _ in range(self._dp_size)]
        dist.all_gather(parts, mine, group=self._dp_group)
        return torch.stack(parts, dim=1).flatten(0, 1)

    def _loss(self, batch: Any, evaluate: Callable[[Any, Any], Any] | None) -> torch.Tensor:
        if self._ddp is None:
            return self._loss_of(batch, evaluate)
        # A forward pass with gradients would prepare DDP's reducer for a backward pass that never comes.
        syncs_next = self._ddp.require_forward_param_sync
        with self._ddp.no_sync():
            loss = self._loss_of(batch, evaluate)
        self._ddp.require_forward_param_sync = syncs_next
        return loss


class ShardGradients:
    """FSDP2: a backward pass leaves in each shard the mean over the ranks' batches.

    So a batch here is as many batches of the window as there are ranks that share it out.

    Args:
        loss_of: the loss on a batch.
        parameters: that train, sharded.
        group: ranks over which sums are taken.
        num_copies: ranks of the group that hold each shard.
    """

    def __init__(self, loss_of: LossOf, parameters: Sequence[torch.Tensor], *, group: Any, num_copies: int) -> None:
        self._loss_of, self._parameters, self._group, self._num_copies = loss_of, parameters, group, num_copies

    def of_batch(self, batch: Any, evaluate: Callable[[Any, Any], Any] | None) -> Sequence[torch.Tensor | None]:
        held = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        try:
            with torch.enable_grad():
                differentiable(self._loss_of(batch, evaluate)).backward()
            return [None if p.grad is None else state.local(p.grad) for p in self._parameters]
        finally:
            for parameter, own in zip(self._parameters, held, strict=True):
                parameter.grad = own

    def joined(self, mine: torch.Tensor) -> torch.Tensor:
        total = mine.clone()
        dist.all_reduce(total, group=self._group)
        return total / self._num_copies


def differentiable(loss: torch.Tensor) -> torch.Tensor:
    """``loss``.

    Raises:
        EvaluationError: if it has no gradient.
    """
    if loss.requires_grad:
        return loss
    raise EvaluationError(
        "the option group_slopes takes gradients of the validation loss, and it has none: evaluate() returns a number, "
        "or computes under no_grad(). Return the loss as a tensor with its graph, or leave the option out."
    )
