"""What a loop does between two steps and the clan sees when the loop goes on: loads, schedules of its own."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler


def own_schedulers(parts: Sequence[torch.optim.Optimizer], given: Sequence[Any]) -> list[LRScheduler]:
    """The schedulers that move the optimizers' rates and were not given to the clan, in the order of the optimizers.

    A loop steps them when it likes: after an epoch, or after a measurement. An optimizer does not know its schedulers.

    Args:
        parts: the loop's optimizers.
        given: the schedulers that the loop steps once after each step.
    """
    places = {id(part): index for index, part in enumerate(parts)}
    # type(), because some objects answer isinstance() by importing what they stand for.
    found = [one for one in gc.get_objects() if issubclass(type(one), LRScheduler)]
    inner = {id(part) for one in [*found, *given] for part in _schedulers_inside(one)} | {id(one) for one in given}
    own = [one for one in found if id(getattr(one, "optimizer", None)) in places and id(one) not in inner]
    return sorted(own, key=lambda one: (places[id(one.optimizer)], type(one).__name__))


def _schedulers_inside(one: Any) -> Iterator[LRScheduler]:
    """Those that a chain of schedulers, or a wrapper around one, steps itself."""
    for value in vars(one).values() if hasattr(one, "__dict__") else ():
        for part in value if isinstance(value, list | tuple) else (value,):
            if isinstance(part, LRScheduler):
                yield part
                yield from _schedulers_inside(part)


class Between:
    """What is due when a loop goes on, in this order: the end of a step, and a new start with a loaded checkpoint.

    A step ends late only if the loop has schedulers of its own, which it moves after the optimizer's step. A round that
    ended earlier would be saved with the rates of the epoch before.
    """

    def __init__(self) -> None:
        self.has_stepped = False
        self.schedulers: list[LRScheduler] = []
        self._on_load: Callable[[], None] | None = None
        self._due: dict[str, Callable[[], None]] = {}

    def end_step(self, call: Callable[[], None]) -> None:
        """Ends a step: now, or when the loop goes on."""
        if self.schedulers:
            self._due["step"] = call
        else:
            call()

    def watch(
        self,
        model: torch.nn.Module,
        module: torch.nn.Module,
        parts: Sequence[torch.optim.Optimizer],
        on_load: Callable[[], None],
    ) -> list[Callable[[], None]]:
        """Hooks the loop's loads, and the training forward pass, with which the loop goes on.

        Args:
            model: what the loop calls.
            module: the user's own module in it.
            parts: the loop's optimizers.
            on_load: follows a checkpoint.

        Returns:
            Functions that remove the hooks.
        """
        self._on_load = on_load

        @torch.compiler.disable
        def before_forward(*_: Any) -> None:
            if model.training:
                self.settle()

        hooks = [
            module.register_load_state_dict_post_hook(lambda *_: self._note_load(is_optimizer=False)),
            # Before FSDP2's own hook, which gathers weights that an evaluation would release.
            model.register_forward_pre_hook(before_forward, prepend=True),
        ]
        for part in parts:
            hooks.append(part.register_load_state_dict_post_hook(lambda *_: self._note_load(is_optimizer=True)))
        return [hook.remove for hook in hooks]

    def _note_load(self, *, is_optimizer: bool) -> None:
        """Notes that the loop has loaded a state.

        Later loads of weights alone are the loop's own business: it may swap averages in and out.
        """
        if self._on_load is not None and (is_optimizer or not self.has_stepped):
            self._due["load"] = self._on_load

    def settle(self) -> None:
        """Does what is due."""
        for name in ("step", "load"):
            call = self._due.pop(name, None)
            if call is not None:
                call()
