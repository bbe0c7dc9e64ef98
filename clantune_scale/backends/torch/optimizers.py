"""One optimizer or several, seen as one: their parameter groups, their state, the hooks on their steps.

A loop may step several optimizers (Muon for matrices, AdamW for the rest), by a list or by a container that has them in
``optimizers``, as torchtitan's does. All of them take one step in each step of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from clantune_scale.backends.torch.hidden_state import require_known_keys, require_own_state
from clantune_scale.errors import ClanError, ConfigError
from clantune_scale.gradients.hooks import replace_method
from clantune_scale.transfer.state import grow_optimizer


def optimizers_in(given: Any) -> list[torch.optim.Optimizer]:
    """The optimizers in what a user passes: one, a list, a container, or a thin wrapper around one.

    Raises:
        ConfigError: if there is something else.
    """
    if isinstance(given, list | tuple):
        return [part for one in given for part in optimizers_in(one)]
    held = getattr(given, "optimizers", None)
    if isinstance(held, list | tuple) and held:
        return optimizers_in(held)
    inner = getattr(given, "optimizer", None)
    # A wrapper that only passes calls on (Accelerate's) shows the state of what it wraps. One with a state of its own
    # (Lookahead's slow weights) is an optimizer itself.
    if isinstance(inner, torch.optim.Optimizer) and getattr(given, "state", None) is inner.state:
        return optimizers_in(inner)
    if not isinstance(given, torch.optim.Optimizer):
        raise ConfigError(
            f"the optimizer is a {type(given).__name__}, and the clan cannot find its state. Pass the "
            f"torch.optim.Optimizer that updates the parameters, or a list of them."
        )
    return [given]


def schedulers_in(given: Any) -> list[Any]:
    """The schedulers in what a user passes: none, one, a list, or a container that has them in ``schedulers``."""
    if given is None:
        return []
    if isinstance(given, list | tuple):
        return [part for one in given for part in schedulers_in(one)]
    held = getattr(given, "schedulers", None)
    return schedulers_in(held) if isinstance(held, list | tuple) and held else [given]


class Optimizers:
    """The optimizers of a loop, in the order in which they were passed.

    Args:
        given: an optimizer, a list of them, or a container.

    Attributes:
        parts: each one.
    """

    def __init__(self, given: Any) -> None:
        self.parts: Sequence[torch.optim.Optimizer] = optimizers_in(given)
        if not self.parts:
            raise ConfigError("there is no optimizer in the list. Pass the ones that the loop steps.")
        require_own_state(self.parts)
        self.state = self

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The live groups of all parts, one part after the other."""
        return [group for part in self.parts for group in part.param_groups]

    @property
    def name(self) -> str:
        """The classes of all parts."""
        return ", ".join(type(part).__name__ for part in self.parts)

    @property
    def has_modes(self) -> bool:
        """Whether a part has a training and an evaluation mode, as schedule-free optimizers have."""
        return any(has_modes(part) for part in self.parts)

    def get(self, parameter: torch.Tensor, default: Any) -> Any:
        """The state that a parameter's optimizer keeps for it."""
        return next((part.state[parameter] for part in self.parts if parameter in part.state), default)

    def grow(self, parameters: Sequence[torch.Tensor], wanted: Collection[int]) -> None:
        """Makes state for exactly the wanted parameters (see :func:`grow_optimizer`)."""
        for part in self.parts:
            mine = {id(p) for group in part.param_groups for p in group["params"]}
            places = [index for index, parameter in enumerate(parameters) if id(parameter) in mine]
            own = [parameters[index] for index in places]
            grow_optimizer(part, own, {place for place, index in enumerate(places) if index in wanted})

    def require_known_keys(self) -> None:
        """Checks that no part keeps state for anything but its parameters.

        Raises:
            ConfigError: if one does.
        """
        for part in self.parts:
            mine = [parameter for group in part.param_groups for parameter in group["params"]]
            require_known_keys(type(part).__name__, part.state, mine)

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    @contextmanager
    def inference_weights(self) -> Iterator[None]:
        """Inside, parts that have an evaluation mode are in it; then each is in the mode in which it was."""
        switched = [part for part in self.parts if has_modes(part) and not _is_evaluated(part)]
        for part in switched:
            part.eval()  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for part in switched:
                part.train()  # type: ignore[attr-defined]


def _is_evaluated(part: torch.optim.Optimizer) -> bool:
    """Whether a part says, as the package schedulefree does, that it is in its evaluation mode."""
    return any(group.get("train_mode") is False for group in part.param_groups)


def has_modes(part: Any) -> bool:
    """Whether an optimizer has a training and an evaluation mode, in which it puts other weights into the model."""
    return callable(getattr(part, "train", None)) and callable(getattr(part, "eval", None))


def after_call(owner: Any, name: str, call: Callable[[], None]) -> Callable[[], None]:
    """Calls ``call`` after each call of a method of one object; returns what undoes that."""
    method = getattr(owner, name)

    # torch's schedulers mark their methods with attributes, which wraps() copies.
    @wraps(method)
    def method_then_call(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        call()
        return result

    return _replace_in_class(owner, name, method_then_call)


def _replace_in_class(owner: Any, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """As :func:`replace_method`, and nothing is added to the object's own attributes.

    The state of torch's schedulers is their attributes. A function among them could not be saved.
    """
    kind = type(owner)
    if name in vars(owner):  # an attribute comes before what a class has
        return replace_method(owner, name, method)
    owner.__class__ = type(kind.__name__, (kind,), {name: staticmethod(method), "__module__": kind.__module__})

    def restore() -> None:
        owner.__class__ = kind

    return restore


class StepEnd:
    """Finds the end of a step of the run: each optimizer, and then each scheduler, has stepped once.

    Args:
        num_optimizers: of the loop.
        num_schedulers: that the loop steps once for each step of the run; a loss scaler is one.
        call: at the end of a step.
    """

    def __init__(self, num_optimizers: int, num_schedulers: int, call: Callable[[], None]) -> None:
        self._waiting_for = {"optimizer": set(range(num_optimizers)), "scheduler": set(range(num_schedulers))}
        self._all = {kind: frozenset(waiting) for kind, waiting in self._waiting_for.items()}
        self._call = call

    @property
    def awaits_schedulers(self) -> bool:
        """Whether all optimizers have stepped, and a scheduler has not."""
        return not self._waiting_for["optimizer"] and bool(self._waiting_for["scheduler"])

    def require_turn(self, index: int, num_steps: int) -> None:
        """Checks that an optimizer which is about to step has not stepped already.

        Raises:
            ClanError: if another one is due.
        """
        if self.awaits_schedulers:
            raise ClanError(
                f"scheduler.step() was not called after optimizer step {num_steps + 1} (or scaler.update(), with a "
                f"scaler). Call it once after each optimizer.step(). If it is not stepped once per optimizer step, "
                f"leave it out of attach()."
            )
        waiting = self._waiting_for["optimizer"]
        if index not in waiting:
            raise ClanError(
                f"optimizer {index} steps for the second time, and optimizer {min(waiting)} has not stepped in step "
                f"{num_steps + 1}. A step of the run is one step of each. Give attach() only optimizers that step "
                f"together."
            )

    def stepped(self, kind: str, index: int) -> None:
        """Notes a step; calls back if it was the last that the run's step waited for."""
        has_optimizer = len(self._waiting_for["optimizer"]) < len(self._all["optimizer"])
        if kind == "scheduler" and not has_optimizer:
            return  # a scheduler's first step at its making, or a loop's own use of it
        self._waiting_for[kind].discard(index)
        if not any(self._waiting_for.values()):
            self._waiting_for = {name: set(every) for name, every in self._all.items()}
            self._call()
