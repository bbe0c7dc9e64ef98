"""A strategy of a user's own, written against ``clantune_scale.strategies`` and nothing else of the package."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from clantune_scale import strategies
from clantune_scale.strategies import (
    ConfigError,
    Decision,
    EvaluationError,
    Fitness,
    Gene,
    Genome,
    Phase,
    PhaseKind,
    Population,
    RoundPlan,
    RunFacts,
    Strategy,
    build,
    mutate,
    permutation,
    require,
)


@dataclass(frozen=True)
class DuelOptions:
    """Options of ``Duel``."""

    gap: float = 0.0

    def __post_init__(self) -> None:
        require(self.gap >= 0, "gap", self.gap, "at least 0")


class Duel(Strategy):
    """Members meet in random pairs; the worse of two takes the other's state, with a mutated genome."""

    Options = DuelOptions

    def __init__(self, facts: RunFacts, options: DuelOptions) -> None:
        super().__init__(facts)
        self.options = options

    def plan(self, index: int, start_step: int) -> RoundPlan:
        return RoundPlan(index, start_step, (Phase(PhaseKind.COOPERATIVE, self.facts.round_length_steps),))

    def init(self, start: Fitness) -> Population:
        return Population((Genome.initial(self.facts.genes),) * start.num_members)

    def evolve(self, population: Population, plan: RoundPlan, fitness: Fitness) -> Decision:
        if not fitness.is_finite.any():
            raise EvaluationError("no member has a finite loss. Lower the learning rate.")
        order = permutation(self.facts.seed, plan.index, strategies.CLAN, "pairs", count=fitness.num_members)
        donors, genomes = list(range(fitness.num_members)), list(population.genomes)
        for first, second in zip(order[::2], order[1::2], strict=True):
            better, worse = sorted((first, second), key=lambda member: fitness.mean[member])
            if fitness.mean[worse] - fitness.mean[better] > self.options.gap:
                donors[worse] = better
                seed, genes = self.facts.seed, self.facts.genes
                genomes[worse] = mutate(genomes[better], genes, seed=seed, round_=plan.index, member=worse)
        return Decision(Population(tuple(genomes)), tuple(donors))


FACTS = RunFacts(4, (Gene("lr"),), seed=0, round_length_steps=5, duty_cycle=0.0)
NAME = f"{__name__}:Duel"


def test_it_runs_by_its_name_in_the_config():
    strategy = build(NAME, FACTS, {"gap": 0.05})
    plan = strategy.plan(0, 0)
    fitness = Fitness.from_losses([[1.0], [2.0], [3.0], [4.0]])
    decision = strategy.evolve(strategy.init(fitness), plan, fitness)
    assert plan.num_steps == 5 and decision == strategy.evolve(strategy.init(fitness), plan, fitness)
    clones = [member for member, donor in enumerate(decision.donors) if donor != member]
    assert len(clones) == 2 and all(fitness.mean[decision.donors[m]] < fitness.mean[m] for m in clones)
    assert all(decision.population.genomes[m].values["lr"] != 1.0 for m in clones)


def test_its_options_are_checked():
    with pytest.raises(ConfigError, match=r"option gap is -1.0. It must be at least 0"):
        build(NAME, FACTS, {"gap": -1.0})
    with pytest.raises(ConfigError, match=r"has no option 'gapp'. Did you mean 'gap'\?"):
        build(NAME, FACTS, {"gapp": 1.0})


def test_the_module_exports_all_that_it_imports_and_no_torch():
    assert {name for name in vars(strategies) if not name.startswith("_")} == set(strategies.__all__)
