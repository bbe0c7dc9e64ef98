"""Replaces lost members by clones of the fittest, whatever the strategy decided.

A strategy may keep a member whose loss is not finite (truncation replaces a fixed share) or lies far outside the
clan's. Neither recovers by more training, and its ranks would be wasted.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from clantune_scale.core.fitness import Fitness
from clantune_scale.core.strategies.base import Decision, Population

#: A spike is above the worst of the others by this many times their range and this many of its standard errors.
SPIKE_FACTOR = 10.0


def lost_members(fitness: Fitness) -> dict[int, str]:
    """Why, by member: those whose loss is not finite, and one that is far outside the others' losses.

    With fewer than three finite losses there is no spike: two losses that differ do not show which one went wrong.
    """
    mean, error = fitness.mean, fitness.standard_error
    lost = {int(m): "its loss is not finite" for m in np.flatnonzero(~fitness.is_finite)}
    finite = np.flatnonzero(fitness.is_finite)
    if finite.size < 3:
        return lost
    worst = int(finite[np.argmax(mean[finite])])
    others = mean[finite[finite != worst]]
    excess = mean[worst] - others.max()
    if excess > SPIKE_FACTOR * np.ptp(others) and excess > SPIKE_FACTOR * np.nan_to_num(error[worst]) and excess > 0:
        lost[worst] = (
            f"its loss of {mean[worst]:.4g} is far outside the others' ({others.min():.4g} to {others.max():.4g})"
        )
    return lost


def replace_lost(decision: Decision, fitness: Fitness) -> Decision:
    """The decision, in which lost members that it would keep become clones of the fittest, including genomes.

    Left unchanged if the clan rolls back or averages its weights (both replace every state), or if
    members compete in teams, whose states must stay alike.
    """
    lost = lost_members(fitness)
    kept = [member for member in lost if decision.donors[member] == member]
    if not kept or len(lost) == fitness.num_members:
        return decision
    if decision.rolls_back or decision.mixing_weights is not None or decision.population.teams is not None:
        return decision
    best = decision.donors[next(m for m in fitness.ranking if decision.donors[m] not in lost)]
    donors, genomes = list(decision.donors), list(decision.population.genomes)
    reasons = list(decision.reasons or ("",) * len(donors))
    for member, donor in enumerate(decision.donors):
        if donor in kept:
            donors[member], genomes[member] = best, genomes[best]
            reasons[member] = f"{lost[donor]}: takes member {best}'s state"
    population = Population(tuple(genomes), decision.population.memory, decision.population.teams)
    return replace(decision, population=population, donors=tuple(donors), reasons=tuple(reasons))
