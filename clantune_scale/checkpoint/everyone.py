"""All ranks of the clan, for the few words that they exchange about rounds on disk."""

from __future__ import annotations

from typing import Any

from clantune_scale.groups import Column
from clantune_scale.world import ClanGroups, ClanWorld


class Everyone:
    """Gathers JSON over the clan: inside each member first, then down the columns. All ranks call each method.

    Args:
        world: this process's place in the clan.
        groups: the clan's groups.
    """

    def __init__(self, world: ClanWorld, groups: ClanGroups) -> None:
        size = world.topology.member_size
        self._member = Column(groups.member() if size > 1 else None, world.at.member_rank, size)
        self._column = world.column
        self.is_leader = world.is_clan_leader

    def gather(self, value: Any) -> list[Any]:
        """What each rank gave, in the launcher's order."""
        return [said for member in self._column.gather_json(self._member.gather_json(value)) for said in member]

    def from_leader(self, value: Any) -> Any:
        """What global rank 0 gave; what the others give does not matter."""
        return self.gather(value if self.is_leader else None)[0]
