"""Who sends to whom: chains of members, the next attempt's, and what all of a column must have in common before."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from clantune_scale.distributed.groups import ReplicaGroup
from clantune_scale.errors import DivergenceError
from clantune_scale.transfer.state import MemberState


def chain_of(member: int, donors: Sequence[int]) -> list[int]:
    """The members that one donor's state passes through, donor first; ``[member]`` alone where none moves."""
    donor = donors[member]
    return [donor] + [m for m, source in enumerate(donors) if source == donor and m != donor]


def donors_of_retry(donors: Sequence[int], failed: Collection[int]) -> list[int]:
    """Who gives to whom once more: a member that failed takes from one that holds the same, verified state.

    That is the last of its chain that received it, so that another host, link and memory are tried, and the donor
    itself where none did. All others keep what they have.
    """
    holders: dict[int, int] = {}
    for member, donor in enumerate(donors):
        if member not in failed and member != donor:
            holders[donor] = member
    return [holders.get(donor, donor) if m in failed else m for m, donor in enumerate(donors)]


@dataclass(frozen=True)
class Route:
    """One rank's part in a transfer.

    Attributes:
        donors: by member.
        column: this rank's control column; all of it takes part, also where nothing moves.
        group_for: device type to the stand-alone group of the column on that device.
        place: this rank's coordinate in its member, the same down the column: ``"pp0.dp1.tp0"``.
    """

    donors: Sequence[int]
    replica_group: ReplicaGroup
    group_for: Callable[[str], Any]
    place: str = ""

    @property
    def chain(self) -> list[int]:
        """The members that this rank's bytes pass through, donor first."""
        return chain_of(self.replica_group.member, self.donors)

    @property
    def before(self) -> int | None:
        """The member that this rank receives from; None on a donor."""
        chain = self.chain
        index = chain.index(self.replica_group.member)
        return chain[index - 1] if index else None

    @property
    def after(self) -> int | None:
        """The member that this rank sends to; None at the end of a chain."""
        chain = self.chain
        index = chain.index(self.replica_group.member)
        return chain[index + 1] if index + 1 < len(chain) else None


def agree(state: MemberState, donors: Sequence[int], replica_group: ReplicaGroup) -> None:
    """Before a byte moves: the same plan and the same layout everywhere in the column.

    Raises:
        DivergenceError: if members ask for different transfers, or their states are laid out differently.
    """
    plans = replica_group.gather_json(list(donors))
    if plans.count(plans[0]) != len(plans):
        raise DivergenceError(
            f"members ask for different transfers: {plans}, by member. This is a bug: please report it."
        )
    difference = replica_group.first_difference(state.manifest(), noun="tensors")
    if difference is not None:
        other, theirs, ours = difference
        raise DivergenceError(
            f"member {other}'s state is laid out differently from member 0's: {theirs} against {ours}. "
            f"Give all members the same model, optimizer and ZeRO settings, and freeze the same parameters."
        )
