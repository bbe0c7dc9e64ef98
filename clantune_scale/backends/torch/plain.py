"""A model that no wrapper makes parallel: one device, or replicas whose gradients the user's own code averages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from clantune_scale.backends.torch.engine import LoopBackend
from clantune_scale.backends.torch.validation_gradients import SCALED, ReplicaGradients
from clantune_scale.errors import ConfigError
from clantune_scale.gradients.probe import GradientProbe
from clantune_scale.runtime.engine_protocol import GradientGroups, ValidationGradients


class PlainBackend(LoopBackend):
    """A plain module, for members on the line only.

    If a process group exists, its ranks hold equal replicas: the loop averages their gradients itself.

    Args:
        model, module, optimizer, scheduler, options: see :class:`LoopBackend`.

    Raises:
        ConfigError: if ranks hold different weights.
    """

    tp_rank = 0
    tp_size = 1

    def __init__(
        self,
        model: torch.nn.Module,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(model, module, optimizer, scheduler, is_line=True, **options)
        is_on = dist.is_initialized()
        self.dp_rank, self.dp_size = (dist.get_rank(), dist.get_world_size()) if is_on else (0, 1)
        self.dp_group = dist.group.WORLD if is_on else None
        if self.dp_size > 1:
            self._require_equal_replicas()

    def exchanging(self, is_last: bool) -> AbstractContextManager[None]:
        """Nothing: the loop averages gradients, if it has to."""
        return nullcontext()

    def validation_gradients(self) -> ValidationGradients | str:
        if self.may_skip_steps:
            return SCALED
        trained = [parameter for _, parameter in self._parameters.trained]
        return ReplicaGradients(self._loss, trained, dp_group=self.dp_group, dp_size=self.dp_size)

    def share_gradients(
        self,
        team: Callable[[], tuple[int, ...]],
        groups: GradientGroups,
        probe: GradientProbe | None = None,
    ) -> None:
        """Members in groups need a wrapper whose reduction can be hooked.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("a plain module has no gradient reduction to hook. Use DistributedDataParallel.")

    @torch.no_grad()
    def _require_equal_replicas(self) -> None:
        """Compares sums of the weights over the ranks; a difference means that they are no replicas."""
        sums = torch.stack([master.double().sum() for master in self.masters()])
        low, high = sums.clone(), sums.clone()
        dist.all_reduce(low, op=dist.ReduceOp.MIN)
        dist.all_reduce(high, op=dist.ReduceOp.MAX)
        if not torch.equal(low, high):
            name = self._parameters.trained[int((low != high).nonzero()[0])][0]
            raise ConfigError(
                f"the process group has {self.dp_size} ranks, the model is a plain {type(self.module).__name__}, and "
                f"{name} differs between ranks, so they are not replicas of one model. Apply fully_shard() or "
                f"DistributedDataParallel to it, or broadcast the weights from one rank first."
            )
