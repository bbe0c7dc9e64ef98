"""The interface of a strategy: the phases of a round, the first population, and the next one by fitness."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clantune_scale.core import decay
from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.mutation import mutate
from clantune_scale.core.rounds import RoundPlan


@dataclass(frozen=True)
class RunFacts:
    """What every strategy may know about the run; equal on all ranks.

    Attributes:
        population_size: number of members.
        genes: the genome's genes, in config order.
        seed: seeds every decision.
        round_length_steps: the user's round length, in optimizer steps.
        duty_cycle: the user's share of a round that is competitive, 0 to 1.
        total_steps: optimizer steps of the whole run, or None if not known.
        sees_samples_once: whether the run is known to see no training sample twice, so that it cannot overfit.
    """

    population_size: int
    genes: tuple[Gene, ...]
    seed: int
    round_length_steps: int
    duty_cycle: float
    total_steps: int | None = None
    sees_samples_once: bool = False

    def gene(self, name: str) -> Gene:
        """The gene of that name."""
        return next(gene for gene in self.genes if gene.name == name)


@dataclass(frozen=True)
class Population:
    """The clan's genomes and the strategy's memory; plain, JSON-serializable data.

    Attributes:
        genomes: one per member.
        memory: the strategy's own state between rounds.
        teams: by member, the team that it competes in from now on (``RoundClock.regroup``); None if
            competitive phases are as the strategy plans them.
    """

    genomes: tuple[Genome, ...]
    memory: Mapping[str, Any] = field(default_factory=dict)
    teams: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Decision:
    """What follows from a round's fitness. It is a pure function of it, and so equal on every rank.

    Attributes:
        population: the next round's.
        donors: ``donors[m]`` is the member whose training state member m receives; m itself if it
            keeps its own. A donor never receives: ``donors[donors[m]] == donors[m]``.
        rolls_back: whether every member first returns to the last rollback snapshot.
        takes_snapshot: whether the guard takes a rollback snapshot of the resulting state; ignored after a
            rollback.
        mixing_weights: by member, the weight of its parameters in a mean that all members then take (after the
            transfers; optimizer states stay their own); sums to 1. None if nothing is averaged.
        reasons: one short phrase per member, for the log.
    """

    population: Population
    donors: tuple[int, ...]
    rolls_back: bool = False
    takes_snapshot: bool = True
    mixing_weights: tuple[float, ...] | None = None
    reasons: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for member, donor in enumerate(self.donors):
            if self.donors[donor] != donor:
                raise ValueError(
                    f"member {member} is to receive from {donor}, which receives from {self.donors[donor]}: "
                    f"donors {self.donors} and recipients must be disjoint"
                )
        if self.mixing_weights is not None and abs(sum(self.mixing_weights) - 1.0) > 1e-9:
            raise ValueError(
                f"the weights of an average must sum to 1, and {self.mixing_weights} sum to {sum(self.mixing_weights)}"
            )


class Strategy(ABC):
    """Base of all strategies. Copy ``control.py`` to write one.

    All methods are pure: they read their arguments and the run's facts and draw their randomness from
    :func:`clantune_scale.core.mutation.normal` and similar functions, so that every rank decides the same.

    Attributes:
        facts: what the run is.
        guards: whether the runtime takes rollback snapshots (``Decision.takes_snapshot``).
        uses_ema: whether any of its rounds measures fitness on averaged weights.
        has_one_state: whether all members go on from one state after every round, so that one model can stand for all
            of them (members on the line).
        needs_slopes: whether any of its plans asks for slopes of learning rates, which only members on the line have.
    """

    guards: bool = False
    uses_ema: bool = False
    has_one_state: bool = False
    needs_slopes: bool = False

    def __init__(self, facts: RunFacts) -> None:
        self.facts = facts

    @abstractmethod
    def plan(self, index: int, start_step: int) -> RoundPlan:
        """The phases of round ``index``, which starts after ``start_step`` optimizer steps."""

    @abstractmethod
    def init(self, start: Fitness) -> Population:
        """The first population, given the losses of the members at step 0."""

    @abstractmethod
    def evolve(self, population: Population, plan: RoundPlan, fitness: Fitness) -> Decision:
        """The decision at the end of the round that ``plan`` describes.

        Raises:
            EvaluationError: if no member has a finite fitness and the strategy cannot roll back.
        """

    def idle(self, population: Population) -> Decision:
        """The decision after a round that does not evolve: all members go on, and the guard takes a snapshot."""
        return Decision(population, tuple(range(self.facts.population_size)))

    def resized(self, population: Population, sources: Sequence[int], plan: RoundPlan) -> Population:
        """The population of a run that goes on with another number of members.

        A member takes the genome of the member whose state it takes. If several take the same state, all but the
        first get its genome mutated, as clones do. The memory is passed on: a strategy overrides this method if its
        memory depends on the number of members.

        Args:
            population: of the round that is over, one genome per member that there was.
            sources: by member that there is now, the one whose state it takes.
            plan: of the round that follows.

        Raises:
            ClanError: if this strategy cannot go on with another number of members.
        """
        genomes = []
        for member, source in enumerate(sources):
            genome = population.genomes[source]
            if source in sources[:member]:
                seed = self.facts.seed
                genome = mutate(genome, self.facts.genes, seed=seed, round_=plan.index - 1, member=member)
            genomes.append(genome)
        return Population(tuple(genomes), population.memory)

    @property
    def decay_start_step(self) -> int | None:
        """The step from which learning rates fall to 0 at the run's end; None if they do not."""
        return None

    def lr_factor(self, step: int) -> float:
        """The final decay's factor, 0 to 1, in the step after ``step`` completed ones.

        It bounds the user's own learning rates and does not multiply them. A learning rate is the smaller of two: the
        user's scheduled one, and this factor times the scheduled one at the decay's start (see
        :mod:`clantune_scale.core.decay`).
        """
        start, total = self.decay_start_step, self.facts.total_steps
        return 1.0 if start is None or total is None else decay.line(step, start_step=start, total_steps=total)
