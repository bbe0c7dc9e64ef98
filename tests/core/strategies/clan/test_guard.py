"""Each question that the guard asks of a round: noise, training, what the last rollbacks mended."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from clantune_scale.core.fitness import Fitness
from clantune_scale.core.strategies.clan.guard import Guard, paired

#: Batches of a window that are hard and easy: their spread drops out of a paired difference.
HARDNESS = np.array([0.0, 2.0, -1.0, 1.0, -2.0, 0.5, -0.5, 0.0])
#: What is left after pairing, mean 0 and standard error 0.1.
NOISE = np.array([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0]) * 0.1 * math.sqrt(7)


def round_of(loss, noise=0.0, training=None, hardness=HARDNESS):
    batches = loss + hardness + noise * NOISE[: len(hardness)]
    return Fitness.from_losses([batches, batches + 1.0], training_loss=training)


def judged(guard, fitness, *, share=0.1, holds=False):
    return guard.judge(fitness, kind="optimizer", share=share, training=fitness.training_loss, holds=holds)


def after(*rounds, start=10.0):
    guard = Guard.of(round_of(start))
    for fitness in rounds:
        guard = judged(guard, fitness).guard
    return guard


@pytest.mark.parametrize(
    ("best", "loss", "noise", "is_lost"),
    [
        (5.0, 5.49, 0.0, False),  # of a progress of 5, 0.5 may be lost
        (5.0, 5.51, 0.0, True),
        (5.0, 5.51, 3.0, False),  # 0.51 is less than two standard errors of 0.3
        (5.0, 5.61, 3.0, True),
        (9.99, 10.1, 1.0, False),  # on a plateau the noise is all that there is
        (9.99, 10.3, 1.0, True),
        (10.0, 10.0001, 0.0, True),  # a deterministic loss has no noise to hide behind
    ],
)
def test_ground_is_lost_beyond_a_share_of_the_progress_and_two_standard_errors(best, loss, noise, is_lost):
    assert judged(after(round_of(best)), round_of(loss, noise)).has_lost_ground is is_lost


def test_an_added_constant_changes_nothing_while_a_loss_is_negative():
    """A log-likelihood's zero is arbitrary."""
    losses = [(-20.0, -20.0), (-25.0, -25.0), (-24.4, -26.0), (-24.4, -24.0), (-19.0, -18.4)]
    told = []
    for constant in (0.0, -1000.0):
        guard = Guard.of(round_of(losses[0][0] + constant))
        verdicts = []
        for loss, training in losses[1:]:
            verdict = judged(guard, round_of(loss + constant, training=training + constant))
            guard = verdict.guard
            verdicts.append((verdict.has_lost_ground, verdict.is_undone))
        told.append(verdicts)
    # Of the training progress from -25 to -26, the quarter above the first is lost in the last round at once.
    assert told[0] == told[1] == [(False, False), (True, False), (True, True), (True, True)]


@pytest.mark.parametrize(
    ("first", "training", "is_undone"),
    [
        (8.0, 9.9, False),
        (8.0, 10.1, True),
        (8.0, None, False),
        (8.0, math.nan, False),
        (8.0, math.inf, False),  # one micro-batch of one member, while validation is finite
        (None, 12.4, False),  # the validation loss before the first step stands for the first round's
        (None, 12.6, True),
        (0.0, 5.0, False),  # a loss without height has no quarter
        (-3.0, 5.0, False),
    ],
)
def test_a_blow_up_is_a_quarter_of_the_training_losss_height(first, training, is_undone):
    guard = after(round_of(9.0, training=first))
    verdict = judged(guard, round_of(13.0, training=training))
    assert verdict.has_lost_ground and verdict.is_undone is is_undone


def test_a_training_loss_that_rises_is_no_blow_up_while_validation_keeps_its_ground():
    """Another mixture of data, or a harder one: nothing is lost."""
    assert not judged(after(round_of(9.0, training=8.0)), round_of(8.9, training=20.0)).is_undone


def test_validation_above_the_first_loss_is_no_blow_up_while_training_gets_on():
    guard, undone = Guard.of(round_of(10.0)), []
    for step in range(6):
        verdict = judged(guard, round_of(11.0 + step, training=9.5 - step))
        guard = verdict.guard
        undone.append(verdict.is_undone)
    assert not any(undone)
    # Of a gain of 5.5 in training it may lose a tenth as well.
    assert not judged(guard, round_of(17.0, training=5.0)).is_undone
    assert judged(guard, round_of(17.0, training=5.1)).is_undone


def test_at_most_two_rollbacks_until_there_is_progress_worth_the_name():
    guard, bad = after(round_of(5.0)), round_of(8.0)
    told = []
    for fitness in (bad, bad, bad, bad, round_of(4.9), bad, bad, round_of(4.4), bad, bad):
        verdict = judged(guard, fitness)
        guard = verdict.guard
        told.append(verdict.is_undone)
    # 4.9 is better, by less than the tenth of the progress whose loss would count; 4.4 is progress.
    assert told == [False, True, True, False, False, False, False, False, False, True]


@pytest.mark.parametrize(
    ("trainings", "undone"),
    [
        ([1e30, 1e20, 1e10, 1e4, 150.0, 40.0], [True] * 5 + [False]),  # each lower rate mends some; 40 is not ruined
        ([1e6, 1e6, 1e6, 9e5], [True, True, False, False]),
        ([1e3, 1e4, 1e5], [True, True, False]),  # data that run away from what a rollback brings back
    ],
)
def test_a_ruined_state_is_rolled_back_as_long_as_lower_rates_mend_it(trainings, undone):
    guard, told = after(round_of(9.0, training=8.0)), []
    for training in trainings:
        verdict = judged(guard, round_of(training, training=training))
        guard = verdict.guard
        told.append(verdict.is_undone)
    assert told == undone
    assert judged(guard, round_of(math.nan)).is_undone


def test_a_clan_that_overfits_is_rolled_back_from_a_blow_up_alone():
    guard = after(round_of(5.0, training=5.0), round_of(9.0, training=5.5))
    assert judged(guard, round_of(9.0, training=5.5)).is_undone
    assert not judged(guard, round_of(9.0, training=5.5), holds=True).is_undone
    assert judged(guard, round_of(9.0, training=6.5), holds=True).is_undone


def test_other_batches_are_compared_without_pairs_and_one_batch_by_a_hundredth_of_the_loss():
    own, other = (10.0 + HARDNESS).tolist(), (9.0 + HARDNESS).tolist()
    difference, error = paired(own, other)
    assert difference == pytest.approx(1.0) and error == pytest.approx(0.0, abs=1e-12)
    perturbations = float(HARDNESS.std(ddof=1))
    difference, error = paired(own[:4] + own, other)
    assert error > perturbations / math.sqrt(12)
    assert paired([10.0], [9.0]) == (1.0, pytest.approx(0.005 * math.hypot(10, 9)))
    assert paired(own, [9.0])[1] == pytest.approx(math.hypot(perturbations / math.sqrt(8), 0.045))
    # A window of another size: a round that would be lost by its pairs is within the batches' own spread.
    guard = after(round_of(9.9))
    assert judged(guard, round_of(10.5)).has_lost_ground
    assert not judged(guard, round_of(10.5, hardness=HARDNESS[:6])).has_lost_ground


def test_memory_is_plain_data():
    guard = after(round_of(5.0, training=4.0), round_of(8.0, training=6.0), round_of(8.0, training=6.0))
    assert guard.rollbacks
    assert Guard.from_memory(json.loads(json.dumps(guard.to_memory()))) == guard
