"""Which families may be tuned on, and which are only for reports.

A family's side follows from its kind, its name and one fixed seed. So it does not move when others are added, and
nobody chooses it. The seed is the first from 0 with which every kind has between 35 and 50 % of its families, and an
AdamW, on the reporting side.
"""

from __future__ import annotations

from clantune_scale.bench.schedules.families.draw import digest
from clantune_scale.bench.schedules.families.registry import (
    OPTIMIZER_FAMILIES,
    SCHEDULES,
    TASKS,
    Family,
    Registry,
    Side,
)

SEED = 5
#: Share of families that are for reports.
REPORTED = 0.42
REGISTRIES: tuple[Registry, ...] = (TASKS, OPTIMIZER_FAMILIES, SCHEDULES)


def side_of(kind: str, family: Family) -> Side:
    """The family's side of the split.

    Args:
        kind: of its registry.
        family: with a side of its own, or without.
    """
    if family.side is not None:
        return family.side
    return "reporting" if digest("split", SEED, kind, family.name) < REPORTED * 2**64 else "tuning"


def sides() -> dict[str, Side]:
    """By ``kind/name``, the side of every family that is known."""
    return {
        f"{registry.kind}/{family.name}": side_of(registry.kind, family)
        for registry in REGISTRIES
        for family in registry
    }


def names_on(side: Side, registry: Registry) -> list[str]:
    """The families of one kind that lie on a side."""
    return [family.name for family in registry if side_of(registry.kind, family) == side]
