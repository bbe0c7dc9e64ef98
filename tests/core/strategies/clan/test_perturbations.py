from __future__ import annotations

import numpy as np
import pytest

from clantune_scale.core.strategies.clan.least_squares import MIN_INDEPENDENCE, independence
from clantune_scale.core.strategies.clan.perturbations import levels, perturbations, regressors


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 16])
def test_levels_are_centred_and_as_wide_as_asked(size):
    z = levels(size)
    assert sum(z) == pytest.approx(0.0, abs=1e-12)
    assert np.mean(z**2) == pytest.approx(1.0)
    assert len(set(np.round(z, 9))) == size


@pytest.mark.parametrize(("size", "num_genes"), [(4, 1), (5, 2), (8, 3), (16, 7)])
def test_every_round_gives_a_design_that_a_parabola_per_gene_can_be_solved_for(size, num_genes):
    names = [f"g{i}" for i in range(num_genes)]
    for round_ in range(20):
        z = perturbations(size, names, seed=0, round_=round_)
        # Random deals to so few members are often nearly alike; the picked ones keep well clear of the
        # limit at which the fit falls back to slopes.
        assert min(independence(regressors(z, quadratic=True))) > 20 * MIN_INDEPENDENCE


def test_chance_deals_the_levels_and_the_seed_fixes_them():
    deals = [perturbations(4, ["lr"], seed=0, round_=r)[:, 0] for r in range(10)]
    assert all(np.array_equal(np.sort(deal), levels(4)) for deal in deals)
    assert len({tuple(deal) for deal in deals}) > 3
    assert np.array_equal(perturbations(4, ["lr"], seed=0, round_=3)[:, 0], deals[3])


def test_a_clan_of_one_stays_at_the_centre():
    assert levels(1).tolist() == [0.0]
