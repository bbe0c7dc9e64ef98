"""The turns of competing members: optimizer steps as the Trainer takes them, of which it counts nothing."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.optimization.automatic import Closure
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.trainer import call

from clantune_scale.core.genome import GROUP_KEYS
from clantune_scale.gradients.hooks import replace_method
from clantune_scale.integrations.lightning.evaluation import beside_training
from clantune_scale.runtime.validation_window import found_loss

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]
_SCHEDULED = sorted({key for key, _ in GROUP_KEYS.values()})


class Turns:
    """``watch`` and ``train_step`` of a clan in the Trainer.

    A micro-batch is what ``training_step`` gets. Schedules are no part of a turn: each of its steps begins with the
    rates, schedulers, step and epoch that the same step of the Trainer began with.

    Args:
        trainer: of the run.
        module: that it trains.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module = trainer, module
        self._is_repeating = False

    def watch(
        self, on_batch: Callable[[tuple[Any, ...], dict[str, Any]], None], on_loss: Callable[[Any], None]
    ) -> Callable[[], None]:
        """Shows the clan what ``training_step`` gets, and its loss; returns what ends that."""
        strategy = self._trainer.strategy
        step, backward = strategy.training_step, strategy.backward
        is_automatic = self._module.automatic_optimization

        def watched_step(*args: Any, **kwargs: Any) -> Any:
            if not self._is_repeating:
                on_batch(args, {"begun": self._present()})
            output = step(*args, **kwargs)
            loss = found_loss(output) if is_automatic else None
            if loss is not None:
                on_loss(loss)
            return output

        def watched_backward(loss: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            on_loss(loss)
            return backward(loss, *args, **kwargs)

        undo = [replace_method(strategy, "training_step", watched_step)]
        if not is_automatic:
            # The optimizer steps inside training_step: what that returns comes too late for the step.
            undo.append(replace_method(strategy, "backward", watched_backward))

        def unwatch() -> None:
            for one in undo:
                one()

        return unwatch

    def __call__(self, calls: Calls) -> None:
        """One optimizer step."""
        self._is_repeating = True
        try:
            with (
                beside_training(self._trainer, self._module),
                self._as_it_began(calls[0][1]["begun"]),
                self._untoggled(),
            ):
                if self._module.automatic_optimization:
                    self._automatic(calls)
                    self._move_schedules()
                else:
                    for args, _ in calls:
                        call._call_strategy_hook(self._trainer, "training_step", *args)
        finally:
            self._is_repeating = False

    def _present(self) -> dict[str, Any]:
        """What a step begins with, in numbers and text."""
        trainer = self._trainer
        return {
            "groups": [
                {key: copy.copy(group[key]) for key in _SCHEDULED if key in group}
                for optimizer in trainer.optimizers
                for group in optimizer.param_groups
            ],
            "schedulers": [copy.deepcopy(one.scheduler.state_dict()) for one in trainer.lr_scheduler_configs],
            "global_step": trainer.global_step,
            "epoch": trainer.current_epoch,
        }

    def _set(self, begun: dict[str, Any]) -> None:
        groups = [group for optimizer in self._trainer.optimizers for group in optimizer.param_groups]
        for config, state in zip(self._trainer.lr_scheduler_configs, begun["schedulers"], strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state))
        for group, scheduled in zip(groups, begun["groups"], strict=True):
            group.update({key: copy.copy(value) for key, value in scheduled.items()})

    @contextmanager
    def _as_it_began(self, begun: dict[str, Any]) -> Iterator[None]:
        """Inside, the Trainer is at the step that is repeated; on exit its counts are back."""
        loop: Any = self._trainer.fit_loop
        automatic, manual = loop.epoch_loop.automatic_optimization, loop.epoch_loop.manual_optimization
        is_automatic = self._module.automatic_optimization
        counts = automatic.optim_progress if is_automatic else manual.optim_step_progress
        steps = automatic.optim_progress.optimizer.step.total if is_automatic else manual.optim_step_progress.total
        saved, epoch = copy.deepcopy(counts.state_dict()), loop.epoch_progress.current.processed
        self._set(begun)
        steps.completed, loop.epoch_progress.current.processed = begun["global_step"], begun["epoch"]
        try:
            yield
        finally:
            counts.load_state_dict(saved)
            loop.epoch_progress.current.processed = epoch

    @contextmanager
    def _untoggled(self) -> Iterator[None]:
        """Inside, parameters train as outside of ``toggle_optimizer``, in whose context a step may be taken."""
        module = self._module
        toggled: dict[Any, bool] = dict(module._param_requires_grad_state)
        present = [(parameter, parameter.requires_grad) for parameter in toggled]
        for parameter, requires in toggled.items():
            parameter.requires_grad = requires
        try:
            yield
        finally:
            for parameter, requires in present:
                parameter.requires_grad = requires
            module._param_requires_grad_state = toggled

    def _automatic(self, calls: Calls) -> None:
        """As ``_AutomaticOptimization.run`` does it for each micro-batch, without its counts."""
        trainer, strategy = self._trainer, self._trainer.strategy
        loop = trainer.fit_loop.epoch_loop
        optimizer, wrapped = trainer.optimizers[0], strategy._lightning_optimizers[0]
        for number, (args, _) in enumerate(calls):
            batch_idx = args[1] if len(args) > 1 else loop.batch_idx
            closure = Closure(
                partial(loop.automatic_optimization._training_step, OrderedDict(enumerate(args))),
                backward_fn=lambda loss: call._call_strategy_hook(trainer, "backward", loss, optimizer),
                zero_grad_fn=partial(self._zero_gradients, optimizer, batch_idx) if number == 0 else None,
            )
            if number < len(calls) - 1 and not strategy.handles_gradient_accumulation:
                with _block_parallel_sync_behavior(strategy, block=True):
                    closure()
            else:
                place = (trainer.current_epoch, batch_idx)
                call._call_lightning_module_hook(trainer, "optimizer_step", *place, wrapped, closure)

    def _move_schedules(self) -> None:
        """As the Trainer does after the step that ends a phase, in which turns are taken; it counts nothing of it."""
        loop = self._trainer.fit_loop.epoch_loop
        saved = copy.deepcopy(loop.scheduler_progress.state_dict())
        loop.update_lr_schedulers("step", update_plateau_schedulers=False)
        loop.scheduler_progress.load_state_dict(saved)

    def _zero_gradients(self, optimizer: torch.optim.Optimizer, batch_idx: int) -> None:
        trainer = self._trainer
        call._call_callback_hooks(trainer, "on_before_zero_grad", optimizer)
        call._call_lightning_module_hook(trainer, "on_before_zero_grad", optimizer)
        place = (trainer.current_epoch, batch_idx)
        call._call_lightning_module_hook(trainer, "optimizer_zero_grad", *place, optimizer)
