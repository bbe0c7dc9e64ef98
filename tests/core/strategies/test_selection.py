from __future__ import annotations

import math

import numpy as np
import pytest

from clantune_scale.core.strategies.selection import SELECTIONS, boltzmann, rank, tournament, truncation
from clantune_scale.errors import EvaluationError
from tests.core.strategies.facts import fitness_of

STRENGTH = {"truncation": 0.25, "tournament": 2.0, "rank": 1.5, "boltzmann": 1.0}


@pytest.mark.parametrize("name", SELECTIONS)
def test_members_that_are_not_finite_neither_survive_nor_donate_and_the_fittest_keeps_its_place(name):
    fitness = fitness_of([3.0, math.nan, 1.0, math.inf, 2.0])
    for seed in range(40):
        donors = SELECTIONS[name](fitness, STRENGTH[name], seed, 0)
        assert set(donors) <= {0, 2, 4}
        assert donors[2] == 2
        assert all(donors[donor] == donor for donor in donors)
        assert all(fitness.mean[donor] <= fitness.mean[member] for member, donor in enumerate(donors))


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_clan_without_a_finite_member_is_an_error_that_names_the_round(name):
    with pytest.raises(EvaluationError, match="round 12: none of the 3 members has a finite"):
        SELECTIONS[name](fitness_of([math.nan] * 3), STRENGTH[name], 0, 12)


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_clan_of_one_and_a_clan_of_equals_change_nothing(name):
    assert SELECTIONS[name](fitness_of([1.0]), STRENGTH[name], 0, 0) == (0,)
    assert SELECTIONS[name](fitness_of([1.0] * 6), STRENGTH[name], 0, 0) == tuple(range(6))


def test_truncation_replaces_the_weakest_quarter_by_the_fittest_quarter():
    losses = [5.0, 1.0, 7.0, 2.0, 8.0, 3.0, 6.0, 4.0]
    seen = set()
    for seed in range(30):
        donors = truncation(fitness_of(losses), 0.25, seed, 0)
        assert [m for m, d in enumerate(donors) if d != m] == [2, 4]
        seen |= {donors[2], donors[4]}
    assert seen == {1, 3}


def test_a_tournament_never_harms_and_sometimes_helps_everyone_but_the_fittest():
    losses = [2.0, 1.0, 4.0, 3.0]
    runs = [tournament(fitness_of(losses), 2.0, seed, 0) for seed in range(60)]
    assert all(run[1] == 1 for run in runs)
    assert all(any(run[member] != member for run in runs) for member in (0, 2, 3))


def test_rank_gives_the_fittest_its_expected_number_of_copies():
    # Systematic resampling holds every count to within one of its expectation, 2 here for the fittest of four.
    counts = [rank(fitness_of([4.0, 1.0, 3.0, 2.0]), 2.0, seed, 0).count(1) for seed in range(200)]
    assert set(counts) <= {1, 2, 3}
    assert np.mean(counts) == pytest.approx(2.0, abs=0.15)


def test_a_cold_clan_is_one_family_and_a_hot_one_is_left_alone():
    fitness = fitness_of([4.0, 1.0, 3.0, 2.0])
    assert boltzmann(fitness, 1e-3, 0, 0) == (1, 1, 1, 1)
    assert boltzmann(fitness, 1e6, 0, 0) == (0, 1, 2, 3)
