"""A validation batch's loss as the Trainer would compute it, and a place beside training to compute it in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torchmetrics import Metric

from clantune_scale.errors import EvaluationError
from clantune_scale.gradients.hooks import replace_method
from clantune_scale.runtime.validation_window import found_loss, loss_of


class ValidationStep:
    """``evaluate`` of a clan: a validation batch goes the way that it goes in the Trainer's validation loop.

    Args:
        trainer: of the run.
        module: that it trains.
        evaluate: ``(module, batch) -> loss`` in place of ``validation_step``, or None.
        monitor: metric that ``validation_step`` logs, or None for the loss that it returns.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        *,
        evaluate: Callable[[Any, Any], Any] | None,
        monitor: str | None,
    ) -> None:
        self._trainer, self._module, self._evaluate, self._monitor = trainer, module, evaluate, monitor

    def __call__(self, _: Any, batch: Any) -> torch.Tensor:
        """[] the loss.

        Raises:
            EvaluationError: if nothing says which number is the loss.
        """
        trainer, module = self._trainer, self._module
        batch = trainer.precision_plugin.convert_input(batch)
        batch = call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)
        with beside_training(trainer, module) as logged:
            if self._evaluate is not None:
                with trainer.precision_plugin.val_step_context():
                    return loss_of(self._evaluate(module, batch))
            output = call._call_strategy_hook(trainer, "validation_step", *self._arguments(batch))
        return self._loss(output, logged)

    def _arguments(self, batch: Any) -> list[Any]:
        step = self._module.validation_step
        has_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)
        has_loader = is_param_in_hook_signature(step, "dataloader_idx", explicit=True)
        return [batch, *([0] if has_index else []), *([0] if has_loader else [])]

    def _loss(self, output: Any, logged: dict[str, Any]) -> torch.Tensor:
        name = self._monitor
        if name is not None:
            if name not in logged:
                raise EvaluationError(
                    f"validation_step logs {sorted(logged) or 'nothing'}, and monitor is {name!r}. Name one of what it "
                    f"logs, or pass evaluate=lambda module, batch: loss to ClanCallback."
                )
            return loss_of(logged[name])
        loss = found_loss(output)
        if loss is None:
            raise EvaluationError(
                f"validation_step returns a {type(output).__name__} and logs {sorted(logged) or 'nothing'}: which "
                f"number is the loss? Return it, or name what is logged: ClanCallback(..., monitor=...), or pass "
                f"evaluate=lambda module, batch: loss."
            )
        return loss


@contextmanager
def beside_training(trainer: Trainer, module: LightningModule) -> Iterator[dict[str, Any]]:
    """Inside, steps of the module leave no trace in what the Trainer logs: metrics, their states, the profile.

    Yields:
        What ``self.log`` is given inside, by name: the last value.
    """
    logged: dict[str, Any] = {}

    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        logged[name] = value.detach() if isinstance(value, torch.Tensor) else value

    metrics = [part for part in module.modules() if isinstance(part, Metric)]
    states = [_state_of(metric) for metric in metrics]
    holder: Any = trainer  # Lightning declares its profiler nowhere
    profiler, holder.profiler = holder.profiler, PassThroughProfiler()
    restore_log = replace_method(module, "log", log)
    try:
        yield logged
    finally:
        restore_log()
        holder.profiler = profiler
        for metric, state in zip(metrics, states, strict=True):
            metric.__dict__.update(state)


def _state_of(metric: Metric) -> dict[str, Any]:
    kept = [*metric._defaults, "_update_count", "_computed"]
    return {name: deepcopy(value) for name, value in metric.__dict__.items() if name in kept}
