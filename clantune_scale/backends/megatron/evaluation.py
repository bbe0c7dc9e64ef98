"""The loss of one validation batch by Megatron's own schedule, on every rank of the replica."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from clantune_scale.data.containers import tensors_in, to_device
from clantune_scale.errors import EvaluationError
from clantune_scale.runtime.validation_window import loss_of


class ScheduledLoss:
    """Runs the pipeline forward and broadcasts the last stage's loss to all stages.

    Args:
        model: Megatron's ``DistributedDataParallel``.
        pp_group: this rank's pipeline.
        forward_step: the ``(data_iterator, model) -> (output, loss_func)`` that training uses.
        seq_length: tokens of a sequence.
    """

    def __init__(self, model: Any, pp_group: Any, forward_step: Callable[..., Any], seq_length: int) -> None:
        self._model, self._pp_group = model, pp_group
        self._forward_step, self._seq_length = forward_step, seq_length
        self._found: torch.Tensor | None = None
        self._device = next(model.parameters()).device

    def __call__(self, batch: Any, evaluate: Callable[[Any, Any], Any] | None = None) -> torch.Tensor:
        """[] float64: the loss of ``batch`` (a collective of the pipeline and of its tensor ranks).

        Args:
            batch: as the data loader yields it.
            evaluate: the user's ``(model, batch) -> loss``; None for the training's forward step.

        Raises:
            EvaluationError: if the last stage computed no loss.
        """
        self._found = None
        if evaluate is None:
            self._schedule(to_device(batch, self._device))
        else:
            output = evaluate(self._model, batch)
            self._found = loss_of(output) if self._is_last else None
        if self._is_last and self._found is None:
            raise EvaluationError("forward_step returned no loss function on the last pipeline stage. Return one.")
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        if self._found is not None:
            loss.copy_(self._found.detach().reshape(()))
        if self._pp_group.size() > 1:
            source = dist.get_global_rank(self._pp_group, self._pp_group.size() - 1)
            dist.broadcast(loss, src=source, group=self._pp_group)
        return loss

    @property
    def _is_last(self) -> bool:
        return self._pp_group.rank() == self._pp_group.size() - 1

    def _schedule(self, batch: Any) -> None:
        samples = next(tensors_in(batch)).shape[0]
        get_forward_backward_func()(
            forward_step_func=self._forward_and_record,
            data_iterator=iter([batch]),
            model=[self._model],
            num_microbatches=1,
            seq_length=self._seq_length,
            micro_batch_size=samples,
            forward_only=True,
        )

    def _forward_and_record(self, data_iterator: Any, model: Any, *options: Any) -> Any:
        """The user's forward step, with a loss function that also records the loss."""
        output, loss_func = self._forward_step(data_iterator, model, *options)
        return output, loss_func and partial(self._record, loss_func)

    def _record(self, loss_func: Callable[..., Any], output: Any, **options: Any) -> Any:
        result = loss_func(output, **options)
        # (loss, report), or (sum over tokens, number of tokens, report). Cloned, as the schedule divides in place.
        self._found = result[0].detach().clone().float()
        if len(result) == 3:
            self._found /= result[1].clamp(min=1)
        return result
