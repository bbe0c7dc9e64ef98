from __future__ import annotations

import math

import pytest

from clantune_scale.core.strategies import build
from clantune_scale.core.strategies.clan.prior import Prior
from clantune_scale.errors import ConfigError
from tests.core.strategies.facts import FACTS, facts, fitness_of

PRIOR = Prior(width=math.log(2), doubt=0.3, pull=0.2)
START = fitness_of([4.0] * 4)
SEARCH = {"trial_cost": 0.0, "start_factor": 1.0}


def taken(change, distance):
    return PRIOR.shrunk(change, distance)[0]


def test_a_move_away_is_taken_in_proportion_to_its_size():
    assert [taken(x, 0.0) for x in (0.1, 0.3, -0.15)] == [0.0, 0.0, 0.0]
    # x (1 - (0.3 / x)^2)
    assert taken(0.6, 0.0) == pytest.approx(0.45)
    assert taken(0.5, 0.0) == pytest.approx(0.32)


def test_a_lower_rate_is_doubted_half_as_much():
    assert taken(-0.3, 0.0) == pytest.approx(-0.3 * (1 - 0.5**2))


def test_far_from_the_configured_rate_nothing_is_doubted_and_nothing_pulls():
    far = math.log(13)
    assert taken(0.1, far) == pytest.approx(0.1, rel=1e-3)
    assert taken(0.0, far) == pytest.approx(0.0, abs=1e-3)


def test_one_standard_deviation_away_the_doubt_is_e_to_the_minus_a_half_of_itself():
    doubt = 0.3 * math.exp(-0.5)
    assert taken(0.4, math.log(2)) == pytest.approx(0.4 - doubt**2 / 0.4)


def test_a_move_towards_the_configured_rate_is_taken_as_it_is():
    assert taken(-0.2, 0.5) == -0.2
    assert taken(0.5, -0.5) == 0.5


def test_what_goes_beyond_the_configured_rate_is_doubted_as_from_there():
    assert taken(0.7, -0.5) == 0.5
    assert taken(1.1, -0.5) == pytest.approx(0.5 + 0.45)


def test_a_rate_that_nothing_holds_up_goes_back_down():
    share = 0.2 * math.exp(-0.5)
    for asked in (0.0, 0.1, -0.01):
        assert taken(asked, math.log(2)) == pytest.approx(-share * math.log(2))
    assert taken(-0.2, math.log(2)) == -0.2
    assert taken(0.0, -math.log(2)) == 0.0


def test_a_doubted_rise_adds_up_until_it_is_beyond_the_doubt():
    doubted, moves = 0.0, []
    for _ in range(4):
        change, doubted = PRIOR.shrunk(0.2, 0.0, doubted)
        moves.append(change)
    # Doubted are 0.2, then 0.8 x 0.2 + 0.2 = 0.36, of which 0.3^2 / 0.36 = 0.25 is.
    assert moves[:2] == [0.0, pytest.approx(0.11)]
    assert min(moves[1:]) > 0.1
    small, doubted = [], 0.0
    for _ in range(30):
        change, doubted = PRIOR.shrunk(0.05, 0.0, doubted)
        small.append(change)
    assert small == [0.0] * 30  # 0.05 / (1 - 0.8) is within it


@pytest.mark.parametrize(("change", "distance"), [(-0.1, 0.0), (0.0, 0.0), (0.05, 0.3)])
def test_a_round_that_asks_for_no_rise_or_is_pulled_back_ends_that(change, distance):
    assert PRIOR.shrunk(change, distance, 0.1)[1] == 0.0


@pytest.mark.parametrize("change", [-0.5, -0.01, 0.0, 0.2])
def test_no_prior_leaves_moves_alone(change):
    assert Prior(width=0.0, doubt=0.3, pull=0.2).shrunk(change, 0.7) == (change, 0.0)


def centre_of(options, minimum, rounds=1, **facts_):
    """The learning rate's centre after rounds whose parabola has its minimum so far from the clan's own rate."""
    clan = build("clan", facts(**facts_) if facts_ else FACTS, options)
    population, best = clan.init(START), 3.0
    for index in range(rounds):
        centre, best = population.memory["centre"]["lr"], best - 0.1
        losses = [best + (math.log(own.values["lr"]) - centre - minimum) ** 2 for own in population.genomes]
        population = clan.evolve(population, clan.plan(index, 10 * index), fitness_of(losses)).population
    return population.memory["centre"]["lr"]


def test_a_clan_leaves_the_configured_rate_for_a_distant_minimum_only():
    assert centre_of(SEARCH, -0.14) == 0.0
    assert centre_of(SEARCH, -0.3) == pytest.approx(-0.3 * 0.75)
    assert centre_of({**SEARCH, "prior": 1.0}, -0.14) == pytest.approx(-0.14)


def test_a_rate_above_the_configured_one_that_no_round_holds_up_comes_back():
    """Members that share a displacement find the rate that they have good, so the line search alone stays."""
    higher = {"trial_cost": 0.0, "start_factor": 1.8}
    assert centre_of({**higher, "prior": 1.0}, 0.0, rounds=6) == pytest.approx(math.log(1.8))
    assert 0 < centre_of(higher, 0.0, rounds=6) < 0.6 * math.log(1.8)


def test_evidence_that_stays_takes_a_clan_as_far_as_it_says():
    alone = centre_of({**SEARCH, "prior": 1.0}, -0.6, rounds=4)
    assert alone == pytest.approx(-2.4)
    assert alone < centre_of(SEARCH, -0.6, rounds=4) < -2.3


def test_what_is_doubted_is_remembered_by_the_clan_and_forgotten_in_a_rollback():
    clan = build("clan", FACTS, SEARCH)
    population = clan.init(START)
    rising = [3.0 + (math.log(genome.values["lr"]) - 0.2) ** 2 for genome in population.genomes]
    population = clan.evolve(population, clan.plan(0, 0), fitness_of(rising)).population
    asked = math.log(1 + 0.4 / 2.4)  # the minimum along the displacement
    assert population.memory["doubted"]["lr"] == pytest.approx(0.8 * asked)
    undone = clan.evolve(population, clan.plan(1, 10), fitness_of([math.nan] * 4))
    assert undone.rolls_back and undone.population.memory["doubted"] == {}


def test_a_clan_of_two_sees_no_minimum_and_has_no_prior():
    clan = build("clan", facts(population_size=2), SEARCH)
    population = clan.init(fitness_of([4.0] * 2))
    losses = [3.0 + math.log(genome.values["lr"]) for genome in population.genomes]
    decision = clan.evolve(population, clan.plan(0, 0), fitness_of(losses))
    assert decision.population.memory["centre"]["lr"] == pytest.approx(-0.1)


def test_a_move_says_that_it_was_changed():
    clan = build("clan", FACTS, SEARCH)
    population = clan.init(START)
    losses = [3.0 + (math.log(genome.values["lr"]) + 0.3) ** 2 for genome in population.genomes]
    decision = clan.evolve(population, clan.plan(0, 0), fitness_of(losses))
    said = decision.reasons[decision.donors[0]]
    assert said == "fittest; lr -0.225 (minimum, the configured rate is believed)"


@pytest.mark.parametrize("options", [{"prior": 0.5}, {"prior_doubt": -0.1}, {"prior_pull": 1.5}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        build("clan", FACTS, options)
