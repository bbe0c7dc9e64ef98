"""A baseline: rounds, evaluation and cloning of the fittest, without mutation or perturbation.

It measures the gain of selection without tuning. MF-PBT showed that this gain can look like tuning.
It is also the shortest complete strategy: copy it to write another.
"""

from __future__ import annotations

from dataclasses import dataclass

from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Genome
from clantune_scale.core.rounds import RoundPlan
from clantune_scale.core.strategies.base import Decision, Population, RunFacts, Strategy
from clantune_scale.core.strategies.lengths import competitive_steps, phases, round_end
from clantune_scale.core.strategies.options import require
from clantune_scale.core.strategies.selection import truncation


@dataclass(frozen=True)
class ControlOptions:
    """Options of ``control``.

    Attributes:
        fraction: share of the clan that selection replaces each round, above 0 and at most 0.5.
        competes: whether rounds end with the user's duty cycle of competition, as ``classic``'s do;
            if not, the run is plain data parallelism.
    """

    fraction: float = 0.25
    competes: bool = False

    def __post_init__(self) -> None:
        require(0 < self.fraction <= 0.5, "fraction", self.fraction, "above 0 and at most 0.5")


class Control(Strategy):
    """Rounds of fixed length in which all members carry the first genome."""

    Options = ControlOptions

    def __init__(self, facts: RunFacts, options: ControlOptions | None = None) -> None:
        super().__init__(facts)
        self.options = options or ControlOptions()
        # Members that never compete stay equal.
        self.has_one_state = not self.options.competes

    def plan(self, index: int, start_step: int) -> RoundPlan:
        end = round_end(start_step, self.facts.round_length_steps, self.facts.total_steps)
        length = end - start_step
        competing = competitive_steps(length, self.facts.duty_cycle) if self.options.competes else 0
        evolves = end != self.facts.total_steps
        return RoundPlan(index, start_step, phases(length, competing, keeps=True), evolves=evolves)

    def init(self, start: Fitness) -> Population:
        return Population((Genome.initial(self.facts.genes),) * self.facts.population_size)

    def evolve(self, population: Population, plan: RoundPlan, fitness: Fitness) -> Decision:
        donors = truncation(fitness, self.options.fraction, self.facts.seed, plan.index)
        reasons = tuple("keeps its state" if d == m else f"clone of {d}" for m, d in enumerate(donors))
        return Decision(population, donors, reasons=reasons)
