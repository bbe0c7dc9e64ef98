"""AdamW and SGD with momentum over rows of weights, every member with hyperparameters of its own.

Each repeats torch's arithmetic in torch's order, so that a batched clan and one of torch's optimizers agree
to rounding. Hyperparameters have the shape [clans, members, 1], or [clans, 1, 1] if a clan's members agree.
An update that they all share is then computed once per clan. Hyperparameters are float64 and are rounded
last: 1 - beta2 would lose half its digits in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch

from clantune_scale.bench.batched.state import State, widened
from clantune_scale.core.line import DecayRule

Hyper = Mapping[str, torch.Tensor]


class RowOptimizer(ABC):
    """An update rule.

    Attributes:
        slots: names of what it remembers.
        defaults: hyperparameters besides ``lr`` and ``weight_decay``, with torch's own defaults.
    """

    slots: ClassVar[tuple[str, ...]]
    defaults: ClassVar[Mapping[str, float]]

    @abstractmethod
    def update(self, state: State, gradient: torch.Tensor, hyper: Hyper) -> None:
        """Applies ``gradient`` [clans, members or 1, size] in place."""

    def decay_rule(self, scalars: Mapping[str, float]) -> DecayRule:
        """How a weight decay reaches the weights, with these hyperparameters; decoupled unless a rule says more."""
        return DecayRule()


class AdamW(RowOptimizer):
    """Loshchilov and Hutter 2019, decoupled weight decay, as ``torch.optim.AdamW``."""

    slots = ("exp_avg", "exp_avg_sq")
    defaults: ClassVar = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}

    @torch.no_grad()
    def update(self, state: State, gradient: torch.Tensor, hyper: Hyper) -> None:
        lr, beta1, beta2, dtype = hyper["lr"], hyper["beta1"], hyper["beta2"], gradient.dtype
        _widen(state, max(t.shape[1] for t in (gradient, beta1, beta2, *state.slots.values())))
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
    def update(self, state: State, gradient: torch.Tensor, hyper: Hyper) -> None:
        momentum, dtype = hyper["momentum"], gradient.dtype
        if bool(hyper["weight_decay"].any()):
            gradient = gradient + hyper["weight_decay"].to(dtype) * state.weights
        _widen(state, max(t.shape[1] for t in (gradient, momentum, *state.slots.values())))
        state.num_updates += 1
        buffer = state.slots["momentum_buffer"].mul_(momentum.to(dtype)).add_(gradient)
        state.weights.addcmul_(buffer, hyper["lr"].to(dtype), value=-1)


OPTIMIZERS: dict[str, RowOptimizer] = {"adamw": AdamW(), "sgd": Momentum()}


def _widen(state: State, num_members: int) -> None:
    """Gives every member its own slots if gradients or hyperparameters differ between members."""
    if num_members > 1:
        state.slots = {name: widened(slot, num_members) for name, slot in state.slots.items()}
        state.num_updates = widened(state.num_updates, num_members)
