"""Who leads a team, and where members go whose team is given up."""

from __future__ import annotations

from collections.abc import Sequence


def leaders_of(teams: Sequence[int], order: Sequence[int]) -> list[tuple[int, int]]:
    """(team, its fittest member), from the fittest team on; a team without a finite loss has none and is left out.

    Args:
        teams: by member.
        order: members whose loss is finite, from the fittest on.
    """
    leaders: dict[int, int] = {}
    for member in order:
        leaders.setdefault(teams[member], member)
    return list(leaders.items())


def join(teams: tuple[int, ...], staying: Sequence[int]) -> tuple[int, ...]:
    """By member, its next team: one that stays keeps its members, the rest go one by one to the smallest.

    Args:
        teams: by member.
        staying: the teams that go on, from the fittest on; of equally small ones the fitter gets the next member.
    """
    sizes = {team: teams.count(team) for team in staying}
    joined = list(teams)
    for member, team in enumerate(teams):
        if team not in sizes:
            joined[member] = min(staying, key=sizes.__getitem__)
            sizes[joined[member]] += 1
    return tuple(joined)
