from __future__ import annotations

from clantune_scale.core.strategies.teams import join, leaders_of


def test_a_team_is_as_fit_as_its_fittest_member_and_one_without_a_finite_loss_is_left_out():
    assert leaders_of((0, 0, 2, 3, 2), order=[4, 1, 2, 0]) == [(2, 4), (0, 1)]


def test_the_rest_go_one_by_one_to_the_smallest_team_the_fitter_first():
    assert join((0, 1, 2, 3), [2, 1]) == (2, 1, 2, 1)
    assert join((0, 1, 2, 3, 4), [4, 1]) == (4, 1, 1, 4, 4)
    assert join((0, 0, 0, 3, 4), [0, 3]) == (0, 0, 0, 3, 3)  # 0 has three already
    assert join((0, 0, 2, 2), [2]) == (2, 2, 2, 2)
    assert join((0, 1), [0, 1]) == (0, 1)
