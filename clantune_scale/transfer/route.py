"""The route of a transfer: chains of members, the retry's chains, and the check that all peers agree on the plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from clantune_scale.distributed.groups import ReplicaGroup
from clantune_scale.errors import DivergenceError
from clantune_scale.transfer.state import MemberState


def chain_of(member: int, donors: Sequence[int]) -> list[int]:
    """The members that one donor's state passes through, donor first; ``[member]`` if nothing moves.

    Args:
        member: any member of the chain.
        donors: by member.
    """
    donor = donors[member]
    return [donor] + [m for m, source in enumerate(donors) if source == donor and m != donor]


def donors_of_retry(donors: Sequence[int], failed: Collection[int]) -> list[int]:
    """The donors of the second attempt, by member.

    A failed member receives from the last member of its chain that holds the verified state, so that the retry uses
    another host, link and memory. If no other member of the chain holds it, the donor sends again. All members that did
    not fail keep their state.

    Args:
        donors: by member, of the first attempt.
        failed: members whose first attempt failed.
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
        replica_group: this rank and its peers. All of them take part, even if they neither send nor receive.
        group_for: maps a device type to the stand-alone group of these ranks on that device.
        place: this rank's coordinates in its member, equal for all peers: ``"pp0.dp1.tp0"``.
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


def agree(state: MemberState, donors: Sequence[int], replica_group: ReplicaGroup) -> MemberState:
    """Checks, before a byte moves, that all peers have the same plan, and lays recipients out as their donors are.

    Args:
        state: this rank's live state.
        donors: by member.
        replica_group: this rank and its peers.

    Returns:
        The state. A recipient's has just the optimizer state that its donor's has.

    Raises:
        DivergenceError: if members ask for different transfers, or their states are laid out differently.
    """
    plans = replica_group.gather_json(list(donors))
    if plans.count(plans[0]) != len(plans):
        raise DivergenceError(
            f"members ask for different transfers: {plans}, by member. This is a bug. Please report it."
        )
    member = replica_group.member
    if replica_group.first_difference(state.optimizer_entries(), noun="entries") is not None:
        # A member whose parameters have had no gradient yet has no optimizer state for them, or its donor has none.
        entries = replica_group.gather_json(state.optimizer_entries())
        if donors[member] != member:
            state = state.with_optimizer_state(entries[donors[member]])
    difference = replica_group.first_difference(state.layout(), noun="tensors", others=donors)
    if difference is not None:
        other, theirs, ours = difference
        raise DivergenceError(
            f"member {other}'s state is laid out differently from member {donors[other]}'s: {theirs} against {ours}. "
            f"Give all members the same model, optimizer and ZeRO settings, and freeze the same parameters. If a "
            f"buffer grows with the batches that a member sees, register it with persistent=False."
        )
    return state
