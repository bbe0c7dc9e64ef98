from __future__ import annotations

import math

import pytest

from clantune_scale.core.strategies.clan.overfitting import OverfittingDetector, regularized, scale_of
from clantune_scale.core.strategies.clan.parabola import Move
from tests.core.strategies.facts import DROPOUT, LR, fitness_of


@pytest.mark.parametrize(
    ("training", "validation", "overfits"),
    [
        (1.0, 1.44, False),
        (1.0, 1.46, True),  # training gained 3.0, of which 0.15 is 0.45
        (1.0, 0.9, False),
        (None, 1.5, False),
        (math.nan, 1.5, False),
        (1.0, math.nan, False),
        (1.0, 4.1, False),  # a blow-up is the guard's business
        (4.2, 3.9, False),
    ],
)
def test_it_overfits_where_validation_misses_more_than_a_share_of_what_training_gained(training, validation, overfits):
    fitness = fitness_of([validation + 0.3, validation], training_loss=training)
    assert OverfittingDetector(initial_loss=4.0, scale=1.0).overfits(fitness) is overfits


def test_losses_in_other_units_say_the_same():
    same = [OverfittingDetector(4.0, 10.0).overfits(fitness_of([loss], training_loss=10.0)) for loss in (1.44, 1.46)]
    assert same == [False, True]


@pytest.mark.parametrize(
    ("training", "scale"), [(3.0, 1.0), (2.5, 1.0), (3.6, 1.0), (30.0, 10.0), (None, None), (-1.0, None), (0.0, None)]
)
def test_the_scale_is_that_of_the_first_round_or_1_where_both_are_about_equal(training, scale):
    assert scale_of(fitness_of([3.0, 3.5], training_loss=training)) == scale


def test_what_overfits_is_regularized_where_its_round_is_about_that():
    moves = {"lr": Move(0.2, "minimum")}
    assert regularized(moves, (LR, DROPOUT)) == moves
    assert regularized(moves | {"dropout": Move(-0.05, "slope")}, (LR, DROPOUT)) == moves | {
        "dropout": Move(DROPOUT.max_change, "overfitting")
    }
