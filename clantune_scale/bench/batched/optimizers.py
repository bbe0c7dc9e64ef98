"""Update rules over rows of weights, every member with hyperparameters of its own.

Those that look at a parameter's shape are in ``matrix_optimizers``. Each repeats torch's
arithmetic in torch's order, so that a batched clan and one of torch's optimizers agree to rounding. Hyperparameters
have the shape [clans, members, 1], or [clans, 1, 1] if a clan's members agree. An update that they all share is then
computed once per clan. Hyperparameters are float64 and are rounded last: 1 - beta2 would lose half its digits in
float32.

:func:`register` adds a rule under a name, and :class:`~clantune_scale.bench.batched.Settings` takes that name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch

from clantune_scale.bench.batched.state import RowLayout, State, widened
from clantune_scale.core.line import DecayRule
from clantune_scale.errors import ConfigError

Hyper = Mapping[str, torch.Tensor]


class RowOptimizer(ABC):
    """An update rule.

    Attributes:
        slots: names of what it remembers.
        defaults: hyperparameters besides ``lr`` and ``weight_decay``, with the original's own defaults.
    """

    slots: ClassVar[tuple[str, ...]]
    defaults: ClassVar[Mapping[str, float]]

    def slot_sizes(self, layout: RowLayout) -> dict[str, int]:
        """By slot, the numbers that it holds for one model; as many as the model has, unless a rule says less."""
        return dict.fromkeys(self.slots, layout.size)

    @abstractmethod
    def update(self, state: State, gradient: torch.Tensor, hyper: Hyper, layout: RowLayout) -> None:
        """Applies ``gradient`` [clans, members or 1, size] in place; ``layout`` says where each parameter lies."""

    def decay_rule(self, scalars: Mapping[str, float]) -> DecayRule:
        """How a weight decay reaches the weights, with these hyperparameters; decoupled unless a rule says more."""
        return DecayRule()


class AdamW(RowOptimizer):
    """Loshchilov and Hutter 2019, decoupled weight decay, as ``torch.optim.AdamW``."""

    slots = ("exp_avg", "exp_avg_sq")
    defaults: ClassVar = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}

    @torch.no_grad()
    def update(self, state: State, gradient: torch.Tensor, hyper: Hyper, layout: RowLayout) -> None:
        lr, beta1, beta2, dtype = hyper["lr"], hyper["beta1"], hyper["beta2"], gradient.dtype
        widen(state, gradient, beta1, beta2)
        first, second = state.slots["exp_avg"], state.slots["exp_avg_sq"]
        state.num_updates += 1
        first.lerp_(gradient, (1 - beta1).to(dtype))
        second.mul_(beta2.to(dtype)).addcmul_(gradient * (1 - beta2).to(dtype), gradient)
        correction = (1 - beta2**state.num_updates).sqrt().to(dtype)
        denominator = second.sqrt().div_(correction).add_(hyper["eps"].to(dtype))
        if bool(hyper["weight_decay"].any()):
            state.weights.mul_((1 - lr * hyper["weight_decay"]).to(dtype))
        state.weights.addcmul_(first / denominator, (lr / (1 - beta1**state.num_updates)).to(dtype), value=-1)


class Momentum(RowOptimizer):
    """Heavy-ball momentum with coupled weight decay, as ``torch.optim.SGD``."""

    slots = ("momentum_buffer",)
    defaults: ClassVar = {"momentum": 0.9}

    def decay_rule(self, scalars: Mapping[str, float]) -> DecayRule:
        return DecayRule(scalars["momentum"])

    @torch.no_grad()
    def update(self, state: State, gradient: torch.Tensor, hyper: Hyper, layout: RowLayout) -> None:
        momentum, dtype = hyper["momentum"], gradient.dtype
        gradient = with_decay(gradient, state, hyper)
        widen(state, gradient, momentum)
        state.num_updates += 1
        buffer = state.slots["momentum_buffer"].mul_(momentum.to(dtype)).add_(gradient)
        direction = self._direction(gradient, buffer, momentum.to(dtype))
        state.weights.addcmul_(direction, hyper["lr"].to(dtype), value=-1)

    def _direction(self, gradient: torch.Tensor, buffer: torch.Tensor, momentum: torch.Tensor) -> torch.Tensor:
        return buffer


class Nesterov(Momentum):
    """Momentum that looks a step ahead (Nesterov 1983; Sutskever et al. 2013), as ``torch.optim.SGD``."""

    def decay_rule(self, scalars: Mapping[str, float]) -> DecayRule:
        return DecayRule(scalars["momentum"], nesterov=True)

    def _direction(self, gradient: torch.Tensor, buffer: torch.Tensor, momentum: torch.Tensor) -> torch.Tensor:
        return gradient + momentum * buffer


class Lion(RowOptimizer):
    """The sign of an interpolated momentum, decoupled weight decay (Chen et al. 2023, algorithm 2)."""

    slots = ("exp_avg",)
    defaults: ClassVar = {"beta1": 0.9, "beta2": 0.99}

    @torch.no_grad()
    def update(self, state: State, gradient: torch.Tensor, hyper: Hyper, layout: RowLayout) -> None:
        lr, beta1, beta2, dtype = hyper["lr"], hyper["beta1"], hyper["beta2"], gradient.dtype
        widen(state, gradient, beta1, beta2)
        state.num_updates += 1
        average = state.slots["exp_avg"]
        direction = torch.lerp(average, gradient, (1 - beta1).to(dtype)).sign_()
        average.lerp_(gradient, (1 - beta2).to(dtype))
        if bool(hyper["weight_decay"].any()):
            state.weights.mul_((1 - lr * hyper["weight_decay"]).to(dtype))
        state.weights.addcmul_(direction, lr.to(dtype), value=-1)


class RMSprop(RowOptimizer):
    """Gradients over their own root mean square, then momentum, coupled weight decay, as ``torch.optim.RMSprop``."""

    slots = ("square_avg", "momentum_buffer")
    defaults: ClassVar = {"alpha": 0.99, "momentum": 0.0, "eps": 1e-8}

    @torch.no_grad()
    def update(self, state: State, gradient: torch.Tensor, hyper: Hyper, layout: RowLayout) -> None:
        alpha, momentum, dtype = hyper["alpha"], hyper["momentum"], gradient.dtype
        gradient = with_decay(gradient, state, hyper)
        widen(state, gradient, alpha, momentum)
        state.num_updates += 1
        square, buffer = state.slots["square_avg"], state.slots["momentum_buffer"]
        square.mul_(alpha.to(dtype)).addcmul_(gradient * (1 - alpha).to(dtype), gradient)
        buffer.mul_(momentum.to(dtype)).add_(gradient / square.sqrt().add_(hyper["eps"].to(dtype)))
        state.weights.addcmul_(buffer, hyper["lr"].to(dtype), value=-1)


#: By the name that settings give.
OPTIMIZERS: dict[str, RowOptimizer] = {}


def register(name: str, rule: RowOptimizer) -> None:
    """Makes a rule known under a name.

    Raises:
        ConfigError: if another rule has that name.
    """
    if name in OPTIMIZERS:
        raise ConfigError(f"there is a batched optimizer {name!r} already: {OPTIMIZERS[name]}. Choose another name.")
    OPTIMIZERS[name] = rule


for _name, _rule in {
    "adamw": AdamW(),
    "sgd": Momentum(),
    "nesterov": Nesterov(),
    "lion": Lion(),
    "rmsprop": RMSprop(),
}.items():
    register(_name, _rule)


def with_decay(gradient: torch.Tensor, state: State, hyper: Hyper) -> torch.Tensor:
    """``gradient`` with a coupled weight decay, each member's own if there is any."""
    if not bool(hyper["weight_decay"].any()):
        return gradient
    return gradient + hyper["weight_decay"].to(gradient.dtype) * state.weights


def widen(state: State, *told: torch.Tensor) -> None:
    """Gives every member its own slots if gradients or hyperparameters ([clans, members or 1, ...]) differ."""
    num_members = max(tensor.shape[1] for tensor in (*told, *state.slots.values()))
    if num_members > 1:
        state.slots = {name: widened(slot, num_members) for name, slot in state.slots.items()}
        state.num_updates = widened(state.num_updates, num_members)
