"""Leaders of teams, and the next teams of members whose team is dissolved."""

from __future__ import annotations

from collections.abc import Sequence


def leaders_of(teams: Sequence[int], order: Sequence[int]) -> list[tuple[int, int]]:
    """(team, its fittest member), from the fittest team on; a team without a finite loss is left out.

    Args:
        teams: by member.
        order: members whose loss is finite, from the fittest on.
    """
    leaders: dict[int, int] = {}
    for member in order:
        leaders.setdefault(teams[member], member)
    return list(leaders.items())


def join(teams: tuple[int, ...], staying: Sequence[int]) -> tuple[int, ...]:
    """By member, its next team. A team that stays keeps its members; the others go one by one to the smallest team.

    Args:
        teams: by member.
        staying: the teams that go on, from the fittest on; the fitter of equally small ones gets the next member.
    """
    sizes = {team: teams.count(team) for team in staying}
    joined = list(teams)
    for member, team in enumerate(teams):
        if team not in sizes:
            joined[member] = min(staying, key=sizes.__getitem__)
            sizes[joined[member]] += 1
    return tuple(joined)
