"""The race of ``clan``: members apart for a while, each at a rate of its own, to see how far rates should rise.

A round of ``clan`` is a line search along one displacement that all members share, and where gradient noise
rules it says "stay": what the shared steps have averaged away of the noise comes back at any other length. A
member that takes its own steps finds its own balance. So once, early, while rates are still low and little
noise has built up, contestants train on the clan's whole batch each, at rates from the clan's own upwards;
all go on from the fittest one's state, and nothing that was trained is thrown away but the others' work.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clantune_scale.core.genome import Gene
from clantune_scale.core.rounds import Phase, PhaseKind
from clantune_scale.core.strategies.base import RunFacts
from clantune_scale.core.strategies.least_squares import least_squares
from clantune_scale.core.strategies.parabola import Move

#: Contestants that a parabola takes, and as many as a race has where the clan can be shared out among them.
FEWEST, USUAL = 3, 4
#: A race that is shorter ends before momentum has settled, and ranks by chance (the benchmark's log, 4).
MIN_STEPS = 20


@dataclass(frozen=True)
class Race:
    """When it is and who runs in it.

    Attributes:
        start_step: optimizer steps done before it.
        num_steps: its length.
        teams: by member, its contestant; members of one share gradients and data and act as one.
        offsets: [contestants] of the learning rates, in log units above the centre, ascending from 0.
    """

    start_step: int
    num_steps: int
    teams: tuple[int, ...]
    offsets: tuple[float, ...]

    @property
    def end_step(self) -> int:
        return self.start_step + self.num_steps

    @property
    def phase(self) -> Phase:
        """Every contestant trains on as much as the clan does when it cooperates."""
        batch_factor = len(self.offsets)
        return Phase(PhaseKind.COMPETITIVE, self.num_steps, batch_factor=batch_factor, teams=self.teams)

    def offset(self, member: int) -> float:
        """How far above the centre the member's learning rates are, in log units."""
        return self.offsets[self.teams[member]]


def races(gene: Gene) -> bool:
    """Whether the gene is one that a race is about: a learning rate, in factors."""
    return gene.target == "lr" and gene.scale == "log"


def plan_race(facts: RunFacts, *, at: float, cost: float, reach: float) -> Race | None:
    """The run's race; None where there is no rate to find, nobody to find it, or no time.

    Args:
        facts: of the run.
        at: share of the run after which it starts.
        cost: its extra gradient evaluations as a share of the run's, from which its length follows.
        reach: the highest rate over the clan's.
    """
    size, total = facts.population_size, facts.total_steps
    if not cost or total is None or size < FEWEST or not any(map(races, facts.genes)):
        return None
    count = next(count for count in range(min(USUAL, size), size + 1) if size % count == 0)
    num_steps = round(cost / (count - 1) * total)
    if num_steps < MIN_STEPS:
        return None
    teams = tuple(member * count // size for member in range(size))
    offsets = tuple(math.log(reach) * place / (count - 1) for place in range(count))
    return Race(max(1, round(at * total)), num_steps, teams, offsets)


def outcome(offsets: Sequence[float], losses: Sequence[float], *, share: float) -> Move:
    """How far learning rates rise: to the minimum of a parabola through the fittest contestant and its neighbours.

    Never down: a race from a rate that is too high already rewards whoever averages its noise away.

    Args:
        offsets: [contestants], ascending from 0.
        losses: [contestants]; infinite where it diverged.
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
    return Move(share * max(minimum, 0.0), "race")
