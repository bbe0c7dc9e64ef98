"""A strategy for tests: rounds as they are written down, members at given multiples of the rate, one donor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Genome
from clantune_scale.core.rounds import Phase, PhaseKind, RoundPlan
from clantune_scale.core.strategies.base import Decision, Population, RunFacts, Strategy


@dataclass(frozen=True)
class ScriptedOptions:
    """Options of :class:`Scripted`.

    Attributes:
        rounds: of each round, ``[kind, num_steps, factors by member, donor after it or -1]``; the last one goes on.
    """

    rounds: list = field(default_factory=list)


class Scripted(Strategy):
    """Does what it is told."""

    Options = ScriptedOptions

    def __init__(self, facts: RunFacts, options: ScriptedOptions) -> None:
        super().__init__(facts)
        self.options = options

    def _round(self, index: int) -> list[Any]:
        return self.options.rounds[min(index, len(self.options.rounds) - 1)]

    def plan(self, index: int, start_step: int) -> RoundPlan:
        kind, num_steps, *_ = self._round(index)
        return RoundPlan(index, start_step, (Phase(PhaseKind(kind), num_steps),))

    def init(self, start: Fitness) -> Population:
        return self._population(0)

    def evolve(self, population: Population, plan: RoundPlan, fitness: Fitness) -> Decision:
        donor = self._round(plan.index)[3]
        size = self.facts.population_size
        donors = tuple(range(size)) if donor < 0 else (donor,) * size
        return Decision(self._population(plan.index + 1), donors)

    def _population(self, index: int) -> Population:
        step_sizes = Genome.initial(self.facts.genes).step_sizes
        return Population(tuple(Genome({"lr": factor}, step_sizes) for factor in self._round(index)[2]))
