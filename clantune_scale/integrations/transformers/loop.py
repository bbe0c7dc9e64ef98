"""Trainer's loop as the clan sees it: what it does in a step, and how to do one step more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import Trainer
from transformers.optimization import GreedyLR

from clantune_scale.gradients.hooks import replace_method
from clantune_scale.integrations.common import require_plain_batch


class TrainerLoop:
    """The steps of one Trainer.

    Args:
        trainer: whose model, optimizer and scheduler are prepared.

    Attributes:
        scheduler: that ends each step; None if it follows a metric, or DeepSpeed's engine steps it.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        scheduler = trainer.lr_scheduler
        # These follow a metric and not the steps. DeepSpeed's wrapper says that the engine steps its own.
        is_stepped = not isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau | GreedyLR)
        is_engines = type(scheduler).__name__ == "DeepSpeedSchedulerWrapper"
        self._is_stepped = is_stepped
        self.scheduler = scheduler if is_stepped and not is_engines else None

    def watch(self, on_batch: Callable[[Any, Any], None], on_loss: Callable[[Any], None]) -> Callable[[], None]:
        """Shows the clan the inputs of each ``training_step``, and its loss as a mean over the micro-batch."""
        trainer = self._trainer
        step = trainer.training_step
        has_seen = False

        def step_watched(model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            nonlocal has_seen
            if not has_seen:
                require_plain_batch(inputs)
                has_seen = True
            on_batch((inputs, num_items_in_batch), {})
            loss: torch.Tensor = step(model, inputs, num_items_in_batch)
            # Trainer's losses add up to the step's mean over its micro-batches.
            on_loss(loss * trainer.current_gradient_accumulation_steps)
            return loss

        return replace_method(trainer, "training_step", step_watched)

    def train_step(self, calls: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        """One optimizer step as in ``Trainer._run_epoch``, on inputs of ``training_step``."""
        trainer: Any = self._trainer
        accelerator, model = trainer.accelerator, trainer.model_wrapped
        state = accelerator.gradient_state
        before = trainer.current_gradient_accumulation_steps, state.sync_gradients
        trainer.current_gradient_accumulation_steps = len(calls)
        syncs_always = trainer.is_deepspeed_enabled or state.plugin_kwargs.get("sync_each_batch", False)
        for number, ((inputs, num_items), _) in enumerate(calls):
            is_last = number == len(calls) - 1
            state._set_sync_gradients(is_last)
            with nullcontext() if is_last or syncs_always else accelerator.no_sync(model):
                trainer.training_step(model, inputs, num_items)
        norm = trainer._clip_grad_norm(model) if trainer.args.max_grad_norm > 0 else None
        trainer._get_grad_norm(model, grad_norm=norm)
        trainer.optimizer.step()
        if self._is_stepped and not accelerator.optimizer_step_was_skipped:
            trainer.lr_scheduler.step()
        model.zero_grad()
        trainer.current_gradient_accumulation_steps, _ = before
        state._set_sync_gradients(before[1])

    def evaluate(self, model: Any, batch: Any) -> torch.Tensor:
        """[] Trainer's loss on a batch: the mean over its items, on this rank."""
        trainer: Any = self._trainer
        inputs = trainer._prepare_inputs(batch)
        with _own_mean(trainer), trainer.compute_loss_context_manager():
            num_items = trainer._get_num_items_in_batch([inputs], trainer.args.device)
            loss: torch.Tensor = trainer.compute_loss(model, inputs, num_items_in_batch=num_items)
        return loss.detach().mean()


@contextmanager
def _own_mean(trainer: Trainer) -> Iterator[None]:
    """Inside, a loss is the mean over this rank's items: ranks measure different batches of the window."""
    args = trainer.args
    before, args.average_tokens_across_devices = args.average_tokens_across_devices, False
    try:
        yield
    finally:
        args.average_tokens_across_devices = before
