"""A member of the reference clan: a module, its optimizer, the average of its weights, and copies of all that."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from clantune_scale.core.line import averaging_weight


@dataclass(frozen=True)
class Saved:
    """A member's training state, copied: weights and buffers, the optimizer's state, the averaged weights."""

    module: dict[str, Any]
    optimizer: dict[int, Any]
    average: list[torch.Tensor]


class Member:
    """A module, its optimizer and the average of its weights.

    Args:
        module: its own copy.
        optimizer: over the module's parameters.
        scheduler: the user's, stepped after every step; or None.
        clip: largest global norm of the gradient; 0 for no clipping.

    Attributes:
        scheduled: [groups] learning rates by the user's own schedule, in the last step before the final decay.
    """

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, clip: float) -> None:
        self.module, self.optimizer, self.scheduler, self.clip = module, optimizer, scheduler, clip
        self.scheduled = [float(group["lr"]) for group in optimizer.param_groups]
        self.parameters = list(module.parameters())
        self.average = [p.detach().clone() for p in self.parameters]

    def save(self) -> Saved:
        """A copy of its whole training state."""
        state = (self.module.state_dict(), self.optimizer.state_dict()["state"], self.average)
        return Saved(*copy.deepcopy(state))

    def load(self, saved: Saved) -> None:
        """Takes a saved state; hyperparameters and the schedule go on, because they belong to the step."""
        saved = copy.deepcopy(saved)
        self.module.load_state_dict(saved.module)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": saved.optimizer, "param_groups": groups})
        self.average = saved.average

    @torch.no_grad()
    def update_average(self, num_steps: int, window_steps: int) -> None:
        """Takes in the weights after a step; early on, the window is 0.9 of the steps done."""
        weight = averaging_weight(num_steps, window_steps)
        for average, parameter in zip(self.average, self.parameters, strict=True):
            average.lerp_(parameter, weight)

    @torch.no_grad()
    def swap_average(self) -> None:
        """Exchanges weights and averaged weights; a second call undoes the first."""
        for average, parameter in zip(self.average, self.parameters, strict=True):
            held = average.clone()
            average.copy_(parameter)
            parameter.copy_(held)
