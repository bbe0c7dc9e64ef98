"""Whose gradients each member applies: the clan's mean, its team's, or its own; and how long they may be."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clantune_scale.core.rounds import Phase, PhaseKind


class Sharing:
    """A phase's rule.

    Args:
        num_members: of a clan.
        mixing: [clans, members, members], each row a member's weights on all members' gradients; None if
            every clan shares among all its members.
    """

    def __init__(self, num_members: int, mixing: torch.Tensor | None) -> None:
        self._num_members, self._mixing = num_members, mixing
        self._is_alone = mixing is not None and bool((mixing == torch.eye(num_members)).all())

    @classmethod
    def of(cls, phases: Sequence[Phase], num_members: int) -> Sharing:
        """The rule of phases ([clans]) that may have teams of their own."""
        if all(phase.kind is PhaseKind.COOPERATIVE for phase in phases):
            return cls(num_members, None)
        return cls(num_members, torch.tensor([_mixing(phase, num_members) for phase in phases]))

    def shared(self, gradients: Sequence[torch.Tensor]) -> torch.Tensor:
        """[clans, members or 1, size], from the parameters' gradients [clans x members, ...]."""
        parts = [gradient.reshape(-1, self._num_members, gradient[0].numel()) for gradient in gradients]
        if self._mixing is None:
            return torch.cat([part.mean(dim=1, keepdim=True) for part in parts], dim=-1)
        own = torch.cat(parts, dim=-1)
        if self._is_alone:
            return own
        # By team and not by a matrix product: a gradient that is not finite stays in its team.
        mixed = [
            torch.stack([own[clan, rows > 0].mean(dim=0) for rows in weights])
            for clan, weights in enumerate(self._mixing)
        ]
        return torch.stack(mixed)


def clip(gradient: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """``gradient`` [clans, members or 1, size] shortened to its limit ([clans, members or 1, 1]; 0: none).

    The arithmetic of ``torch.nn.utils.clip_grad_norm_``.
    """
    if not bool(limits.any()):
        return gradient
    factor = (limits.to(gradient.dtype) / (gradient.norm(dim=-1, keepdim=True) + 1e-6)).clamp(max=1.0)
    return gradient * torch.where(limits > 0, factor, 1.0)


def _mixing(phase: Phase, num_members: int) -> list[list[float]]:
    if phase.kind is PhaseKind.COOPERATIVE:
        return [[1.0 / num_members] * num_members] * num_members
    teams = phase.teams or tuple(range(num_members))
    return [[(mate == team) / teams.count(team) for mate in teams] for team in teams]
