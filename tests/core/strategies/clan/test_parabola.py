from __future__ import annotations

import math

import numpy as np
import pytest

from clantune_scale.core.strategies.clan.parabola import fit_moves
from clantune_scale.core.strategies.clan.perturbations import perturbations

X = np.array([[-0.15], [-0.05], [0.05], [0.15]])


def one(losses, max_change=0.8):
    return fit_moves(X, np.asarray(losses, dtype=float), [max_change])[0]


def test_a_convex_parabola_sends_the_centre_to_its_minimum():
    move = one(2.0 + 3.0 * (X[:, 0] - 0.4) ** 2)
    assert (move.change, move.why) == (pytest.approx(0.4), "minimum")


def test_a_distant_minimum_is_approached_by_the_largest_change():
    assert one(2.0 + 3.0 * (X[:, 0] + 5.0) ** 2).change == -0.8


def test_a_concave_one_sends_it_downhill_by_the_largest_change():
    move = one(2.0 - 3.0 * (X[:, 0] + 0.4) ** 2)
    assert (move.change, move.why) == (0.8, "downhill")


def test_each_of_several_genes_gets_its_own_minimum():
    x = 0.1 * perturbations(8, ["a", "b", "c"], seed=1, round_=0)
    best = np.array([0.3, -0.2, 0.05])
    moves = fit_moves(x, ((x - best) ** 2) @ np.array([1.0, 5.0, 2.0]) + 4.0, [0.8] * 3)
    assert [m.change for m in moves] == pytest.approx(best)


def test_members_that_are_not_finite_are_left_out():
    losses = 2.0 + 3.0 * (X[:, 0] - 0.4) ** 2
    losses[3] = math.inf
    assert one(losses).change == pytest.approx(0.4)


def test_two_members_give_a_slope_and_one_gives_nothing():
    slope = one([3.0, math.inf, math.inf, 1.0])
    assert (slope.change, slope.why) == (pytest.approx(0.15), "slope")
    alone = one([math.inf, 2.0, math.inf, math.inf])
    assert alone.change == 0
    assert "1 finite members are too few" in alone.why


def test_three_members_cannot_tell_three_genes_apart():
    x = 0.1 * perturbations(3, ["a", "b", "c"], seed=1, round_=0)
    moves = fit_moves(x, np.array([1.0, 2.0, 4.0]), [0.8] * 3)
    assert all(move.change == 0 and "tell genes apart" in move.why for move in moves)


def test_equal_losses_and_equal_members_decide_nothing():
    assert "all losses are equal" in one([2.0] * 4).why
    move = fit_moves(np.zeros((4, 1)), np.array([1.0, 2.0, 3.0, 4.0]), [0.8])[0]
    assert (move.change, move.why) == (0.0, "no decision: members did not differ")


def test_a_symmetric_hilltop_decides_nothing():
    assert one([1.0, 2.0, 2.0, 1.0]).why == "no decision: level"


def test_noise_leaves_the_minimum_unbiased():
    # Losses with noise of a tenth of their range over the members. The mean of 400 fits has a standard
    # error of about 0.003, so that a bias of 0.015 (a tenth of the spread) is found with power above 0.99.
    x = 0.1 * perturbations(8, ["a"], seed=1, round_=0)
    rng = np.random.default_rng(0)
    clean = 3.0 * (x[:, 0] - 0.05) ** 2
    noise = 0.1 * np.ptp(clean)
    changes = [fit_moves(x, clean + noise * rng.standard_normal(8), [0.8])[0].change for _ in range(400)]
    assert np.mean(changes) == pytest.approx(0.05, abs=0.015)


def test_along_a_line_a_rate_goes_no_further_than_the_loss_says():
    """Loss (k - 1.5)^2 at k = exp(x): exact in k, over-reached by the parabola in x."""
    losses = (np.exp(X[:, 0]) - 1.5) ** 2
    free = fit_moves(X, losses, [0.8])[0].change
    along = fit_moves(X, losses, [0.8], is_rate=[True])[0].change
    assert free > 0.6
    assert along == pytest.approx(math.log(1.5), abs=0.03)  # third order in the members' spread


def test_downward_the_parabola_in_log_rate_is_the_nearer_one():
    losses = 2.0 + 3.0 * (X[:, 0] + 0.2) ** 2
    assert fit_moves(X, losses, [0.8], is_rate=[True])[0].change == pytest.approx(-0.2)


def test_caution_moves_little_for_what_noise_may_be_and_as_far_as_before_for_what_it_cannot():
    rng = np.random.default_rng(0)
    x = 0.1 * perturbations(8, ["a"], seed=1, round_=0)

    def changes(slope: float, caution: float) -> np.ndarray:
        losses = [-slope * x + 0.1 * rng.standard_normal((8, 16)) for _ in range(50)]
        return np.array([fit_moves(x, own, [0.8], caution=caution)[0].change for own in losses])

    assert np.abs(changes(1e-3, 1.0)).mean() < 0.6 * np.abs(changes(1e-3, 0.0)).mean()
    assert (changes(100.0, 1.0) == 0.8).all()


def test_batches_that_agree_leave_nothing_to_be_cautious_about():
    losses = 2.0 + 3.0 * (X - 0.4) ** 2 + np.zeros((4, 5))
    assert fit_moves(X, losses, [0.8], caution=5.0)[0].change == pytest.approx(0.4)
