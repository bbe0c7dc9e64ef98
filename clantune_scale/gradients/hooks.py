"""What the engines' hooks have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from clantune_scale.gradients.probe import GradientProbe
from clantune_scale.runtime.engine_protocol import GradientGroups


def replace_method(target: Any, name: str, method: Callable) -> Callable[[], None]:
    """Shadows ``target.name`` by an instance attribute; returns what undoes it."""
    had_own = name in vars(target)
    before = getattr(target, name)
    setattr(target, name, method)

    def restore() -> None:
        if had_own:
            setattr(target, name, before)
        else:
            delattr(target, name)

    return restore


@dataclass(frozen=True)
class GradientSharing:
    """What every hook on gradients reads.

    Attributes:
        team: the members that share gradients in the step that runs, this one among them.
        groups: the stand-alone groups that cross members.
        probe: is shown the member's own gradient beside the clan's, in the steps in which it is active.
    """

    team: Callable[[], tuple[int, ...]]
    groups: GradientGroups
    probe: GradientProbe

    def across_members(self, team: tuple[int, ...], group: Any) -> Any:
        """A group of the member's that an engine reduces over, and its like in the other members of the team."""
        return self.groups.across_members(team, dist.get_process_group_ranks(group))


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Inside, evaluation mode without gradients; each part's mode is afterwards what it was."""
    # Not all of a module need be in one mode: users keep frozen parts in evaluation mode.
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, was_training in modes:
            part.training = was_training
