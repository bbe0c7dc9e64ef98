"""What the engines' gradient hooks share: replacing a method, what a hook reads, and evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from clantune_scale.gradients.posting_order import PostingOrder
from clantune_scale.gradients.probe import GradientProbe


def replace_method(target: Any, name: str, method: Callable) -> Callable[[], None]:
    """Shadows ``target.name`` with an instance attribute.

    Returns:
        A function that restores what it found.
    """
    had_own = name in vars(target)
    before = getattr(target, name)
    setattr(target, name, method)

    def restore() -> None:
        if had_own:
            setattr(target, name, before)
        else:
            delattr(target, name)

    return restore


class GradientGroups(Protocol):
    """The stand-alone groups over which gradients cross members, made when first asked for."""

    def gradient(self, team: tuple[int, ...]) -> Any:
        """All (member, data) ranks of a team that hold this rank's part of the model."""

    def across_members(self, team: tuple[int, ...], member_ranks: Sequence[int]) -> Any:
        """The ranks with these places in their member's world, in all members of the team."""

    def weigh(self, gradients: Sequence[torch.Tensor], team: tuple[int, ...]) -> None:
        """Scales this rank's terms of a sum over a team, in place, before the sum; non-finite ones become zero."""

    def replica_group(self, team: tuple[int, ...]) -> Any:
        """This rank's peers, one in each member of the team."""


@dataclass(frozen=True)
class GradientSharing:
    """What every gradient hook reads.

    Attributes:
        team: returns the members that share gradients in the current step. This member is one of them.
        groups: the stand-alone groups that cross members.
        probe: compares the member's own gradient with the clan's, in the steps in which it is active.
        order: records the collectives that are posted.
    """

    team: Callable[[], tuple[int, ...]]
    groups: GradientGroups
    probe: GradientProbe
    order: PostingOrder = field(default_factory=PostingOrder)

    def across_members(self, team: tuple[int, ...], group: Any) -> Any:
        """One group of the ranks of ``group`` in all members of the team.

        Args:
            team: members, this one among them.
            group: a group of the member's own world, which the engine reduces over.
        """
        return self.groups.across_members(team, dist.get_process_group_ranks(group))


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside; on exit each submodule has the mode that it had before."""
    # Submodules can be in different modes: users keep frozen parts in evaluation mode.
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, was_training in modes:
            part.training = was_training
