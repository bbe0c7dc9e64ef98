from __future__ import annotations

import math

import pytest

from clantune_scale.core.rounds import PhaseKind
from clantune_scale.core.strategies import build
from clantune_scale.errors import EvaluationError
from tests.core.strategies.facts import DROPOUT, LR, facts, fitness_of

GENES = facts(genes=(LR, DROPOUT))


def test_a_round_cooperates_then_competes_and_keeps_the_weights():
    cooperative, competitive = build("classic", GENES).plan(0, 0).phases
    assert (cooperative.kind, cooperative.num_steps) == (PhaseKind.COOPERATIVE, 18)
    assert (competitive.kind, competitive.num_steps, competitive.keeps) == (PhaseKind.COMPETITIVE, 2, True)


def test_the_first_member_starts_as_configured_and_the_others_around_it():
    genomes = build("classic", GENES).init(fitness_of([3.0] * 4)).genomes
    assert genomes[0].values == {"lr": 1.0, "dropout": 0.1}
    assert len({genome.digest() for genome in genomes}) == 4


@pytest.mark.parametrize("selection", ["truncation", "tournament", "rank", "boltzmann"])
def test_clones_are_mutated_and_survivors_are_not(selection):
    classic = build("classic", GENES, {"selection": selection, "temperature": 0.1, "pressure": 2.0})
    population = classic.init(fitness_of([3.0] * 4))
    decision = classic.evolve(population, classic.plan(3, 60), fitness_of([4.0, 1.0, 3.0, 2.0]))
    clones = [m for m, donor in enumerate(decision.donors) if donor != m]
    assert clones
    for member, (before, after) in enumerate(zip(population.genomes, decision.population.genomes, strict=True)):
        parent = population.genomes[decision.donors[member]]
        if member in clones:
            assert all(after.values[name] != parent.values[name] for name in parent.values)
            assert all(after.step_sizes[name] != parent.step_sizes[name] for name in parent.values)
        else:
            assert after == before
    assert decision.reasons[1] == "elite"


def test_decisions_depend_on_seed_and_round_alone():
    fitness = fitness_of([4.0, 1.0, 3.0, 2.0])

    def decide(seed: int, index: int):
        classic = build("classic", facts(genes=(LR, DROPOUT), seed=seed))
        return classic.evolve(classic.init(fitness), classic.plan(index, 20 * index), fitness)

    assert decide(1, 2) == decide(1, 2)
    assert decide(1, 2) != decide(2, 2)
    assert decide(1, 2).population.genomes[0] != decide(1, 3).population.genomes[0]


def test_no_finite_member_is_an_error_that_names_the_round():
    classic = build("classic", GENES)
    with pytest.raises(EvaluationError, match="round 5: none of the 4 members"):
        classic.evolve(classic.init(fitness_of([1.0] * 4)), classic.plan(5, 100), fitness_of([math.nan] * 4))
