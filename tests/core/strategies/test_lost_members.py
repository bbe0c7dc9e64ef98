import math
from dataclasses import replace

import pytest

from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Genome
from clantune_scale.core.strategies.base import Decision, Population
from clantune_scale.core.strategies.lost_members import lost_members, replace_lost


def fitness(*means: float) -> Fitness:
    """Two batches a member, 0.02 apart: a standard error of 0.01."""
    return Fitness.from_losses([[mean - 0.01, mean + 0.01] for mean in means])


def keeping(size: int, **changes) -> Decision:
    """Everyone keeps its state; members' genomes are told apart by their value."""
    genomes = tuple(Genome({"lr": 1.0 + member}, {"lr": 0.1}) for member in range(size))
    return replace(Decision(Population(genomes, {"note": 1}), tuple(range(size))), **changes)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_member_whose_loss_is_not_finite_becomes_the_fittest(loss):
    decision = replace_lost(keeping(4), fitness(3.0, loss, 2.0, loss))
    assert decision.donors == (0, 2, 2, 2)
    assert [genome.values["lr"] for genome in decision.population.genomes] == [1.0, 3.0, 3.0, 3.0]
    assert decision.reasons[1] == "its loss is not finite: takes member 2's state"
    assert decision.reasons[0] == "" and decision.population.memory == {"note": 1}


def test_a_spike_is_ten_ranges_and_ten_errors_above_the_worst_of_the_others():
    assert lost_members(fitness(3.0, 3.02, 3.01, 3.24)).keys() == {3}
    assert lost_members(fitness(3.0, 3.02, 3.01, 3.20)) == {}
    assert lost_members(fitness(3.0, 3.0, 3.0, 3.11)).keys() == {3}
    assert lost_members(fitness(3.0, 3.0, 3.0, 3.09)) == {}
    assert lost_members(fitness(3.0, 3.0, 3.0)) == {}
    assert lost_members(fitness(3.0, 9.0)) == {}


def test_clones_of_a_lost_member_follow_it():
    """A strategy that cannot see a spike may even choose it as a donor."""
    decision = replace_lost(keeping(4, donors=(0, 1, 1, 3)), fitness(3.0, math.nan, 3.0, 2.9))
    assert decision.donors == (0, 3, 3, 3)


def test_the_donor_of_the_fittest_donates_where_the_fittest_itself_receives():
    decision = replace_lost(keeping(3, donors=(1, 1, 2)), fitness(2.0, 2.5, math.nan))
    assert decision.donors == (1, 1, 1)


@pytest.mark.parametrize("change", [{"rolls_back": True}, {"mixing_weights": (0.5, 0.5, 0.0)}])
def test_what_replaces_every_state_is_left_alone(change):
    decision = keeping(3, **change)
    assert replace_lost(decision, fitness(1.0, 2.0, math.nan)) is decision


def test_teams_and_a_clan_without_a_finite_member_are_left_alone():
    decision = keeping(3)
    teams = replace(decision, population=replace(decision.population, teams=(0, 0, 1)))
    assert replace_lost(teams, fitness(1.0, 1.0, math.nan)) is teams
    assert replace_lost(decision, fitness(math.nan, math.nan, math.nan)) is decision


def test_a_member_that_the_strategy_replaces_already_is_its_business():
    decision = keeping(3, donors=(0, 1, 1), reasons=("", "", "clone of 1"))
    assert replace_lost(decision, fitness(1.0, 2.0, math.nan)) is decision
