"""What all members of all clans have learned: one row of weights, averages and optimizer state each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch


class RowLayout:
    """Where each parameter lies in a member's row.

    Args:
        shapes: of a model's parameters, in order.

    Attributes:
        shapes, sizes: of the parameters, in order.
        size: numbers in a row.
    """

    def __init__(self, shapes: Sequence[torch.Size]) -> None:
        self.shapes = [torch.Size(shape) for shape in shapes]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.size = sum(self.sizes)

    def flatten(self, parameters: Iterable[torch.Tensor]) -> torch.Tensor:
        """[size]: one model's parameters as a row."""
        return torch.cat([parameter.reshape(-1) for parameter in parameters])

    def parts(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Parameters [clans, members or 1, *shape] that share memory with ``rows`` [clans, members or 1, size].

        A parameter that is one number has the shape [1].
        """
        return [
            part.unflatten(2, shape) if shape else part
            for part, shape in zip(rows.split(self.sizes, dim=2), self.shapes, strict=True)
        ]

    def views(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Parameters [clans x members, ...] that share memory with ``rows`` [clans, members, size]."""
        flat = rows.flatten(0, 1)
        return [
            part.unflatten(1, shape) if shape else part.squeeze(1)
            for part, shape in zip(flat.split(self.sizes, dim=1), self.shapes, strict=True)
        ]


@dataclass
class State:
    """Training state.

    What all members of a clan hold alike is stored once: while they share every gradient and differ in
    nothing that their optimizer remembers, ``slots`` and ``num_updates`` have 1 in place of ``members``.

    Attributes:
        weights: [clans, members, size].
        average: [clans, members, size], the exponential average of the weights.
        slots: by name, [clans, members or 1, ...], what the optimizer remembers.
        num_updates: [clans, members or 1, 1] float64, updates that the slots have seen.
    """

    weights: torch.Tensor
    average: torch.Tensor
    slots: dict[str, torch.Tensor]
    num_updates: torch.Tensor

    @classmethod
    def initial(cls, rows: torch.Tensor, num_members: int, slot_sizes: Mapping[str, int]) -> State:
        """Every member of clan r starts from ``rows[r]`` ([clans, size]), with an optimizer that has seen nothing."""
        weights = rows.unsqueeze(1).expand(-1, num_members, -1).contiguous()
        slots = {name: rows.new_zeros(len(rows), 1, size) for name, size in slot_sizes.items()}
        return cls(weights, weights.clone(), slots, torch.zeros(len(rows), 1, 1, dtype=torch.float64))

    def save(self) -> State:
        """A copy."""
        slots = {name: slot.clone() for name, slot in self.slots.items()}
        return State(self.weights.clone(), self.average.clone(), slots, self.num_updates.clone())

    @torch.no_grad()
    def load(self, saved: State, clans: torch.Tensor) -> None:
        """Takes back a saved state in some clans.

        Weights stay where they are in memory, because views of them are in use.

        Args:
            saved: from :meth:`save`; left as it is.
            clans: [clans] bool.
        """
        here = clans.view(-1, 1, 1)
        self.weights.copy_(torch.where(here, saved.weights, self.weights))
        self.average.copy_(torch.where(here, saved.average, self.average))
        self.slots = {name: _select(here, saved.slots[name], slot) for name, slot in self.slots.items()}
        self.num_updates = _select(here, saved.num_updates, self.num_updates)

    @torch.no_grad()
    def transfer(self, donors: torch.Tensor) -> None:
        """Member m of clan r takes all that member ``donors[r, m]`` holds ([clans, members] int64)."""
        for role in (self.weights, self.average):
            role.copy_(_taken(role, donors))
        # Clans whose members all took one state hold one optimizer state each again.
        sources = donors[:, :1] if bool((donors == donors[:, :1]).all()) else donors
        self.slots = {name: _taken(slot, sources) for name, slot in self.slots.items()}
        self.num_updates = _taken(self.num_updates, sources)

    @torch.no_grad()
    def mix(self, weights: torch.Tensor, clans: torch.Tensor) -> None:
        """In some clans all members take the weighted mean of weights, and of averages; slots stay each one's own.

        Args:
            weights: [clans, members], each row summing to 1.
            clans: [clans] bool.
        """
        share, here = weights.unsqueeze(-1), clans.view(-1, 1, 1)
        for role in (self.weights, self.average):
            # A member without weight may hold values that are not finite: a product with 0 would keep them.
            mean = torch.where(share == 0, 0.0, role * share).sum(dim=1, keepdim=True)
            role.copy_(torch.where(here, mean, role))

    @torch.no_grad()
    def update_average(self, weight: float) -> None:
        """Moves every average towards the weights by ``weight`` of the way; all of it starts an average anew."""
        if weight == 1.0:
            self.average.copy_(self.weights)
        else:
            self.average.lerp_(self.weights, weight)


def widened(slot: torch.Tensor, num_members: int) -> torch.Tensor:
    """``slot`` [clans, members or 1, ...] with a row of its own for each of ``num_members``."""
    return slot if slot.shape[1] == num_members else slot.expand(-1, num_members, -1).clone()


def _taken(rows: torch.Tensor, donors: torch.Tensor) -> torch.Tensor:
    if rows.shape[1] == 1:
        return rows
    return rows.gather(1, donors.unsqueeze(-1).expand(-1, -1, rows.shape[2]))


def _select(here: torch.Tensor, saved: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
    if bool(here.all()):
        return saved.clone()
    # If one of them is stored once and the other by member, the result is by member.
    return torch.where(here, saved, current)
