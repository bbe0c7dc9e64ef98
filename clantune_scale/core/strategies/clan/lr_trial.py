"""The learning-rate trial of ``clan``: groups train apart for a while, each at its own learning rate.

A round of ``clan`` is a line search along one displacement that all members share. If gradient noise rules it says
"stay": the noise that the shared steps have averaged away comes back at any other length. A member that takes its own
steps finds its own balance. So there is one trial, early, while learning rates are low and little noise has built up.
Its groups train on the clan's whole batch each, at learning rates from the clan's own upwards. All members go on from
the fittest group's state. Only the other groups' work is thrown away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clantune_scale.core.genome import Gene
from clantune_scale.core.rounds import Phase, PhaseKind, expected_steps
from clantune_scale.core.strategies.base import RunFacts
from clantune_scale.core.strategies.clan.least_squares import least_squares
from clantune_scale.core.strategies.clan.parabola import Move

#: Groups that a parabola needs, and the usual number of groups if the clan can be divided so.
FEWEST, USUAL = 3, 4
#: A shorter trial ends before momentum has settled, and ranks by chance (the benchmark's log, 4).
MIN_STEPS = 20


@dataclass(frozen=True)
class LrTrial:
    """When it is, and which members form its groups.

    Attributes:
        start_step: optimizer steps done before it.
        num_steps: its length.
        teams: by member, its group. Members of a group share gradients and data and act as one.
        offsets: [groups] of the learning rates, in log units above the centre, ascending from 0.
    """

    start_step: int
    num_steps: int
    teams: tuple[int, ...]
    offsets: tuple[float, ...]

    @property
    def phase(self) -> Phase:
        """Each group trains on as much data as the cooperating clan; with more than the usual number, on less each."""
        factor = min(len(self.offsets), USUAL)
        return Phase(PhaseKind.COMPETITIVE, self.num_steps, batch_factor=factor, teams=self.teams)

    def offset(self, member: int) -> float:
        """How far above the centre the member's learning rates are, in log units."""
        return self.offsets[self.teams[member]]


def is_trial_gene(gene: Gene) -> bool:
    """Whether the trial sets the gene: a learning rate, in factors."""
    return gene.target == "lr" and gene.scale == "log"


def trial_steps(facts: RunFacts, *, at: float, cost: float) -> range | None:
    """When the trial is; None if there is no learning rate to find, or no time.

    The same for clans of all sizes, so that rounds stay where they were when a run goes on with another number of
    members. A run of unknown length is taken for one of usual length.

    Args:
        facts: of the run.
        at: share of the run after which it starts.
        cost: extra gradient evaluations of the usual number of groups, as a share of the run's.
    """
    total = expected_steps(facts.total_steps, facts.round_length_steps)
    if not cost or not any(map(is_trial_gene, facts.genes)):
        return None
    start_step, num_steps = max(1, round(at * total)), round(cost / (USUAL - 1) * total)
    return range(start_step, start_step + num_steps) if num_steps >= MIN_STEPS else None


def plan_trial(steps: range | None, *, population_size: int, reach: float) -> LrTrial | None:
    """Its groups; None if there is no trial, or members are too few for a parabola.

    Args:
        steps: from :func:`trial_steps`.
        population_size: of the clan.
        reach: the highest rate over the clan's.
    """
    if steps is None or population_size < FEWEST:
        return None
    most = range(min(USUAL, population_size), population_size + 1)
    count = next(count for count in most if population_size % count == 0)
    teams = tuple(member * count // population_size for member in range(population_size))
    offsets = tuple(math.log(reach) * place / (count - 1) for place in range(count))
    return LrTrial(steps.start, len(steps), teams, offsets)


def outcome(offsets: Sequence[float], losses: Sequence[float], *, share: float) -> Move:
    """How far learning rates rise: to the minimum of a parabola through the fittest group and its neighbours.

    Never down: a trial from a learning rate that is too high rewards whoever averages its noise away.

    Args:
        offsets: [groups], ascending from 0.
        losses: [groups]; infinite if it diverged.
        share: of that rise, in log units, that is taken.
    """
    best = int(np.argmin(losses))
    minimum = offsets[best]
    near = slice(best - 1, best + 2)
    if 0 < best < len(offsets) - 1 and np.isfinite(losses[near]).all():
        x = [offset - offsets[best] for offset in offsets[near]]
        fit = least_squares([[1.0] * 3, x, [value * value for value in x]], list(losses[near]))
        if fit is not None and fit[2] > 0:
            minimum -= fit[1] / (2 * fit[2])
    return Move(share * max(minimum, 0.0), "trial")
