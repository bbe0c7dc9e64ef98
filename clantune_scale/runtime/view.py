"""What the parts of a clan share on one rank: what is fixed for the run, and what the run has come to."""

from __future__ import annotations

from dataclasses import dataclass, field

from clantune_scale.config.batch import BatchPlan
from clantune_scale.config.schema import ClanConfig
from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Gene
from clantune_scale.core.lineage import Lineage
from clantune_scale.core.strategies import Population, Strategy
from clantune_scale.data.sampler import ClanBatchSampler
from clantune_scale.data.watch import LossMeter
from clantune_scale.distributed.world import ClanGroups, ClanWorld
from clantune_scale.runtime.engine_protocol import Backend
from clantune_scale.runtime.phases import PhaseManager
from clantune_scale.transfer import Snapshot


@dataclass(frozen=True)
class ClanView:
    """One rank's clan as its parts see it; no field is replaced while the run lasts.

    Attributes:
        world: this process's place among the members.
        backend: the member's engine.
        config: the ``clantune`` block.
        batch: how the clan's batch is divided.
        genes: of every genome.
        strategy: the rules of the rounds.
        phases: the clock of the rounds.
        groups: the process groups that cross members.
    """

    world: ClanWorld
    backend: Backend
    config: ClanConfig
    batch: BatchPlan
    genes: tuple[Gene, ...]
    strategy: Strategy
    phases: PhaseManager
    groups: ClanGroups

    @property
    def has_one_state(self) -> bool:
        """Whether one model stands for all members (members on the line)."""
        return self.config.members == "line"

    @property
    def member(self) -> int:
        """The index of this rank's member."""
        return self.world.member


@dataclass
class Progress:
    """What a round on disk holds beside the engine's state; ``population`` and ``fitness`` are set when a run starts.

    Attributes:
        population: the genomes in effect and the strategy's memory.
        fitness: of the last evaluation.
        phase_snapshot: the state before a phase whose weights are discarded, while the phase runs; else None.
        rollback_snapshot: the state to which a strategy that guards its members rolls back, or None.
        losses: training losses of this rank.
        samplers: this rank's, in the order in which they were made.
        lineage: of all completed rounds.
        num_samples: that the whole clan trained on in completed rounds.
    """

    population: Population = field(init=False)
    fitness: Fitness = field(init=False)
    phase_snapshot: Snapshot | None = None
    rollback_snapshot: Snapshot | None = None
    losses: LossMeter = field(default_factory=LossMeter)
    samplers: list[ClanBatchSampler] = field(default_factory=list)
    lineage: Lineage = field(default_factory=Lineage)
    num_samples: int = 0
