"""The original clan-training proposal: cooperate, compete on common data, prune the weak, clone and mutate the strong.

It is here for study and comparison. At equal cost it solved none of 35 scheduling problems, for two reasons. The loss
at a round's end rewards less noise, and so a smaller learning rate. The competitive phase trains on a fraction of the
batch at a learning rate for the whole batch. ``clan`` solves both problems.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Genome
from clantune_scale.core.mutation import mutate
from clantune_scale.core.rounds import RoundPlan
from clantune_scale.core.strategies.base import Decision, Population, RunFacts, Strategy
from clantune_scale.core.strategies.lengths import competitive_steps, phases, round_end
from clantune_scale.core.strategies.options import require
from clantune_scale.core.strategies.selection import SELECTIONS


@dataclass(frozen=True)
class ClassicOptions:
    """Options of ``classic``.

    Attributes:
        selection: the rule that decides who is replaced by whom.
        fraction: truncation: share of the clan that is replaced each round, above 0 and at most 0.5.
        tournament_size: tournament: members in each tournament, including the member itself, at least 2.
        pressure: rank: expected copies of the fittest, above 1 and at most 2.
        temperature: boltzmann: in standard deviations of the members' losses, above 0.
        tau: standard deviation of the logarithm of a step size's change, at least 0.
        min_step: smallest step size, in multiples of the gene's initial one, above 0 and at most 1.
        max_step: largest step size, likewise, at least 1.
    """

    selection: Literal["truncation", "tournament", "rank", "boltzmann"] = "truncation"
    fraction: float = 0.25
    tournament_size: int = 2
    pressure: float = 1.5
    temperature: float = 1.0
    tau: float = 0.3
    min_step: float = 0.1
    max_step: float = 10.0

    def __post_init__(self) -> None:
        require(0 < self.fraction <= 0.5, "fraction", self.fraction, "above 0 and at most 0.5")
        require(self.tournament_size >= 2, "tournament_size", self.tournament_size, "at least 2")
        require(1 < self.pressure <= 2, "pressure", self.pressure, "above 1 and at most 2")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(self.tau >= 0, "tau", self.tau, "at least 0")
        require(0 < self.min_step <= 1, "min_step", self.min_step, "above 0 and at most 1")
        require(self.max_step >= 1, "max_step", self.max_step, "at least 1")

    @property
    def strength(self) -> float:
        """The number that belongs to the selection rule."""
        strengths = {
            "truncation": self.fraction,
            "tournament": float(self.tournament_size),
            "rank": self.pressure,
            "boltzmann": self.temperature,
        }
        return strengths[self.selection]


class Classic(Strategy):
    """Clan training as first proposed, with self-adaptive mutation."""

    Options = ClassicOptions

    def __init__(self, facts: RunFacts, options: ClassicOptions | None = None) -> None:
        super().__init__(facts)
        self.options = options or ClassicOptions()

    def plan(self, index: int, start_step: int) -> RoundPlan:
        end = round_end(start_step, self.facts.round_length_steps, self.facts.total_steps)
        length = end - start_step
        return RoundPlan(
            index,
            start_step,
            phases(length, competitive_steps(length, self.facts.duty_cycle), keeps=True),
            explores=tuple(gene.name for gene in self.facts.genes),
            evolves=end != self.facts.total_steps,
        )

    def init(self, start: Fitness) -> Population:
        """Member 0 as the user configured it, the others mutated from it."""
        first = Genome.initial(self.facts.genes)
        others = (self._mutated(first, -1, member) for member in range(1, self.facts.population_size))
        return Population((first, *others))

    def evolve(self, population: Population, plan: RoundPlan, fitness: Fitness) -> Decision:
        """Selection, then mutation of only the clones: every survivor, the elite among them, stays as it was measured.

        Raises:
            EvaluationError: if no member's losses are finite; the message names the round.
        """
        select = SELECTIONS[self.options.selection]
        donors = select(fitness, self.options.strength, self.facts.seed, plan.index)
        genomes = tuple(
            genome if donor == member else self._mutated(population.genomes[donor], plan.index, member)
            for member, (genome, donor) in enumerate(zip(population.genomes, donors, strict=True))
        )
        elite = fitness.ranking[0]
        reasons = tuple(
            f"clone of {donor}, mutated" if donor != member else ("elite" if member == elite else "survives")
            for member, donor in enumerate(donors)
        )
        return Decision(Population(genomes, population.memory), donors, reasons=reasons)

    def _mutated(self, genome: Genome, round_: int, member: int) -> Genome:
        o = self.options
        return mutate(
            genome,
            self.facts.genes,
            seed=self.facts.seed,
            round_=round_,
            member=member,
            tau=o.tau,
            min_step=o.min_step,
            max_step=o.max_step,
        )
