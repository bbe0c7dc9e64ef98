"""The messages that all ranks of the clan exchange about rounds on disk."""

from __future__ import annotations

from typing import Any

from clantune_scale.distributed.groups import ReplicaGroup
from clantune_scale.distributed.world import ClanGroups, ClanWorld


class Everyone:
    """Gathers JSON over the clan: inside each member first, then across members. All ranks call each method.

    Args:
        world: this process's place in the clan.
        groups: the clan's groups.
    """

    def __init__(self, world: ClanWorld, groups: ClanGroups) -> None:
        self._world, self._groups = world, groups
        self.is_leader = world.is_clan_leader

    def gather(self, value: Any) -> list[Any]:
        """Each rank's value, in the launcher's order."""
        size = self._world.topology.member_size
        # Looked up at each call: a stored reference would keep the group alive when the interpreter exits.
        member = ReplicaGroup(self._groups.member() if size > 1 else None, self._world.at.member_rank, size)
        return [said for rank in self._world.replica_group.gather_json(member.gather_json(value)) for said in rank]

    def from_leader(self, value: Any) -> Any:
        """The value that global rank 0 gave; the others' values are ignored."""
        return self.gather(value if self.is_leader else None)[0]
