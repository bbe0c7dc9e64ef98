"""Ray Tune's own schedulers as strategies: PBT and PB2 decide over members of a clan as over the trials of a cluster.

A cluster for thousands of small trials would take days, so the schedulers are called as Ray's controller calls them
(a result of every trial at the end of every perturbation interval, in Ray's synchronous mode), with trials that have
no process of their own. What they would have a trial exploit, and the configuration that they give it, is what the
member gets. Differences from a cluster: a member that is lost (its loss not finite, or far out) is replaced whatever
Ray says, as in all strategies, and values stay inside their genes' bounds, by Ray's ``custom_explore_fn``.

A strategy here keeps its scheduler between rounds, and Ray's state is not in the clan's memory: for the benchmark,
not for runs that resume.
"""

from __future__ import annotations

import logging
import math
import random
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from clantune_scale.bench.schedules.peers.extra import imported
from clantune_scale.core import mutation
from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.rounds import Phase, PhaseKind, RoundPlan
from clantune_scale.core.strategies.base import Decision, Population, RunFacts, Strategy
from clantune_scale.core.strategies.lengths import round_end
from clantune_scale.core.strategies.options import require


@dataclass(frozen=True)
class RayOptions:
    """Options of both; all else is as Ray has it by default.

    Attributes:
        full_batch: whether each member trains on the whole batch, which costs ``population_size`` plain runs, or on
            its share of it, so that all members together cost one.
        stretch: perturbation intervals, in the user's rounds.
    """

    full_batch: bool = False
    stretch: int = 1

    def __post_init__(self) -> None:
        require(self.stretch >= 1, "stretch", self.stretch, "1 or more")


class RayStrategy(Strategy):
    """What both have in common: trials for members, results for losses, donors for checkpoints."""

    Options = RayOptions
    method: str

    def __init__(self, facts: RunFacts, options: RayOptions | None = None) -> None:
        super().__init__(facts)
        self.options = options or RayOptions()
        self._trial_class = imported("ray.tune.experiment", method=self.method).Trial
        self._interval = facts.round_length_steps * self.options.stretch
        self._scheduler = _noting(self._scheduler_class())(
            time_attr="step",
            metric="loss",
            mode="min",
            perturbation_interval=self._interval,
            log_config=False,
            synch=True,
            **self._searched(),
        )
        self._trials: list[Any] = []
        self._controller = SimpleNamespace(
            search_alg=None,
            get_trials=lambda: self._trials,
            get_live_trials=lambda: self._trials,
            # A checkpoint is known by its trial; members are copied when the round has been decided.
            _schedule_trial_save=lambda trial, result: trial.trial_id,
            pause_trial=lambda trial, should_checkpoint: None,
        )
        self._worst = 0.0

    def plan(self, index: int, start_step: int) -> RoundPlan:
        end = round_end(start_step, self._interval, self.facts.total_steps)
        factor = self.facts.population_size if self.options.full_batch else 1
        phase = Phase(PhaseKind.COMPETITIVE, end - start_step, batch_factor=factor)
        explores = tuple(gene.name for gene in self.facts.genes)
        return RoundPlan(index, start_step, (phase,), explores=explores, evolves=end != self.facts.total_steps)

    def init(self, start: Fitness) -> Population:
        """Trial 0 with what the user configured, the others with what :meth:`_first_config` gives them."""
        first = self._config(Genome.initial(self.facts.genes))
        self._worst = float(np.max(start.mean, where=start.is_finite, initial=-math.inf))
        with _seeded(self.facts.seed, -1):
            for member in range(self.facts.population_size):
                config = dict(first) if member == 0 else self._first_config(first)
                trial = self._trial_class(self.method, config=config, trial_id=str(member), stub=True)
                trial.set_status("RUNNING")
                self._trials.append(trial)
                self._scheduler.on_trial_add(self._controller, trial)
        return Population(tuple(self._genome(trial.config) for trial in self._trials))

    def evolve(self, population: Population, plan: RoundPlan, fitness: Fitness) -> Decision:
        """What Ray decides from one result per trial."""
        self._scheduler.donors = {}
        losses = self._reported(fitness)
        with _seeded(self.facts.seed, plan.index):
            for trial, genome in zip(self._trials, population.genomes, strict=True):
                trial.set_config(self._config(genome))  # a lost member has got another's
            for trial, loss in zip(self._trials, losses, strict=True):
                self._scheduler.on_trial_result(self._controller, trial, {"step": plan.end_step, "loss": loss})
        donors = tuple(int(self._scheduler.donors.get(t.trial_id, t.trial_id)) for t in self._trials)
        genomes = tuple(self._genome(trial.config) for trial in self._trials)
        reasons = tuple("goes on" if d == m else f"exploits {d}" for m, d in enumerate(donors))
        return Decision(Population(genomes), donors, reasons=reasons)

    def _reported(self, fitness: Fitness) -> list[float]:
        """Mean losses; the worst that was ever seen in place of what is not finite, which Ray does not take."""
        finite = fitness.mean[fitness.is_finite]
        self._worst = max(self._worst, float(finite.max()) if finite.size else -math.inf)
        return np.where(fitness.is_finite, fitness.mean, self._worst).tolist()

    @abstractmethod
    def _scheduler_class(self) -> type:
        """Ray's."""

    @abstractmethod
    def _searched(self) -> dict[str, Any]:
        """Arguments of the scheduler: what is searched, and where."""

    @abstractmethod
    def _first_config(self, first: Mapping[str, float]) -> dict[str, float]:
        """Another trial's than the first."""

    @abstractmethod
    def _config(self, genome: Genome) -> dict[str, float]:
        """What the trial of a member with this genome is configured with."""

    @abstractmethod
    def _genome(self, config: Mapping[str, float]) -> Genome:
        """The reverse."""


class RayPBT(RayStrategy):
    """``ray.tune.schedulers.PopulationBasedTraining``: a gene is multiplied by 0.8 or 1.2, or drawn over its bounds."""

    method = "ray-pbt"

    def _scheduler_class(self) -> type:
        return imported("ray.tune.schedulers", method=self.method).PopulationBasedTraining

    def _searched(self) -> dict[str, Any]:
        drawn = {gene.name: lambda gene=gene: _drawn(gene) for gene in self.facts.genes}
        return {"hyperparam_mutations": drawn, "custom_explore_fn": self._inside}

    def _first_config(self, first: Mapping[str, float]) -> dict[str, float]:
        """Explored from the user's by Ray, as a copy's is: the start of this package's ``pbt`` too."""
        donor = SimpleNamespace(config=dict(first))
        return self._scheduler._get_new_config(donor, donor)[0]

    def _config(self, genome: Genome) -> dict[str, float]:
        return dict(genome.values)

    def _genome(self, config: Mapping[str, float]) -> Genome:
        return Genome(dict(config), {})

    def _inside(self, config: dict[str, float]) -> dict[str, float]:
        kept = {gene.name: min(max(config[gene.name], gene.bounds[0]), gene.bounds[1]) for gene in self.facts.genes}
        return config | kept


class RayPB2(RayStrategy):
    """``ray.tune.schedulers.pb2.PB2`` (Parker-Holder et al. 2020): a Gaussian process says what a copy explores.

    It searches between bounds on a linear axis, so it is given genes on their own scales: logarithms of rates.
    """

    method = "ray-pb2"

    def _scheduler_class(self) -> type:
        imported("sklearn", method=self.method)
        return imported("ray.tune.schedulers.pb2", method=self.method).PB2

    def _searched(self) -> dict[str, Any]:
        bounds = {gene.name: [gene.encode(bound) for bound in gene.bounds] for gene in self.facts.genes}
        return {"hyperparam_bounds": bounds}

    def _first_config(self, first: Mapping[str, float]) -> dict[str, float]:
        """The user's as well, as in the examples of Ray's documentation: on no data there is nothing to infer."""
        return dict(first)

    def _config(self, genome: Genome) -> dict[str, float]:
        return {gene.name: gene.encode(genome.values[gene.name]) for gene in self.facts.genes}

    def _genome(self, config: Mapping[str, float]) -> Genome:
        return Genome({gene.name: gene.decode(config[gene.name]) for gene in self.facts.genes}, {})


def _noting(scheduler_class: type) -> type:
    """The scheduler, which besides notes whom each trial exploits."""

    class Noting(scheduler_class):
        def _exploit(self, controller: Any, trial: Any, trial_to_clone: Any) -> None:
            super()._exploit(controller, trial, trial_to_clone)
            self.donors[trial.trial_id] = trial_to_clone.trial_id

    return Noting


def _drawn(gene: Gene) -> float:
    """Evenly over the gene's bounds in its scale, from the generator that Ray draws from."""
    low, high = (gene.encode(bound) for bound in gene.bounds)
    return gene.decode(random.uniform(low, high))


@contextmanager
def _seeded(seed: int, round_: int) -> Iterator[None]:
    """Ray draws from the global generators: they are seeded by run and round. All that is touched is put back."""
    states, log = (random.getstate(), np.random.get_state()), logging.getLogger("ray.tune.schedulers")
    level, word = log.level, int(mutation.uniform(seed, round_, 0, "ray") * 2**32)
    random.seed(word)
    np.random.seed(word)
    log.setLevel(logging.WARNING)  # it reports every copy, at length
    try:
        # Gaussian processes say on little data that their fit did not settle.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        log.setLevel(level)
