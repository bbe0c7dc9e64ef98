"""How a loop's model is measured on a batch, with gradients and without."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from clantune_scale.backends.torch.parameters import Parameters
from clantune_scale.data.containers import call_on, to_device
from clantune_scale.gradients.hooks import evaluation_mode
from clantune_scale.runtime.engine_protocol import ValidationGradients
from clantune_scale.runtime.validation_window import loss_of, require_fine_loss


class MeasuredLoop(ABC):
    """The part of a loop's engine that measures.

    Attributes:
        engine: what the loop calls.
        device: of the parameters.
    """

    engine: torch.nn.Module
    device: torch.device
    _parameters: Parameters

    @property
    @abstractmethod
    def tp_group(self) -> Any:
        """The ranks that share a model's tensors; None if there are none."""

    @abstractmethod
    def refresh(self) -> None:
        """Brings what the model computes with up to date with the masters."""

    @abstractmethod
    def validation_gradients(self) -> ValidationGradients | str:
        """Gives gradients of validation losses; or says why this engine cannot."""

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode without gradients. On exit each submodule has the mode that it had before."""
        try:
            with evaluation_mode(self.engine):
                yield
        finally:
            self.refresh()

    def batch_loss(self, batch: Any, evaluate: Callable[[Any, Any], Any] | None) -> torch.Tensor:
        """[] the loss on one batch: a mapping is passed by keyword, a sequence by position, anything else as it is."""
        loss = self._loss(batch, evaluate)
        if self._parameters.has_half:
            require_fine_loss(loss)
        loss = (loss.full_tensor() if isinstance(loss, DTensor) else loss).detach().to(self.device)
        if self.tp_group is not None:
            # All ranks decide by this number. Tensor ranks that sum in different orders could differ in the last bit.
            dist.broadcast(loss, group_src=0, group=self.tp_group)
        return loss

    def _loss(self, batch: Any, evaluate: Callable[[Any, Any], Any] | None) -> torch.Tensor:
        if evaluate is not None:
            return loss_of(evaluate(self.engine, batch))
        return loss_of(call_on(self.engine, to_device(batch, self.device)))
