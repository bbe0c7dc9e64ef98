from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from clantune_scale.core.fitness import Slopes
from clantune_scale.core.line import slope_members, slopes_of
from clantune_scale.core.strategies import build
from clantune_scale.errors import ConfigError
from tests.core.strategies.facts import DROPOUT, LR, WEIGHT_DECAY, facts, fitness_of

GENES = tuple(replace(LR, name=f"lr:{group}", target="lr", groups=(group,)) for group in ("a", "b", "c"))
NAMES = tuple(gene.name for gene in GENES)
OPTIONS = {"group_slopes": True, "trial_cost": 0.0, "start_factor": 1.0, "prior": 1.0}
START = fitness_of([4.0] * 4)


def clan_of(*others, **changes):
    return build("clan", facts(genes=(*GENES, *others)), OPTIONS | changes)


def decided(clan, gradient, noise=0.0):
    """The centre after a round whose loss has a gradient in log rates. Its two batches are ``noise`` off it."""
    population, plan = clan.init(START), clan.plan(0, 0)
    ends = slope_members(population.genomes, plan.slopes[0])
    x = [np.log([population.genomes[end].values[name] for name in NAMES]) for end in ends]
    table = np.array([gradient(own) for own in x])  # [ends, genes]
    by_gene = {name: np.stack([table[:, i] - noise, table[:, i] + noise], axis=1) for i, name in enumerate(NAMES)}
    fitness = replace(fitness_of([3.0, 3.1, 3.2, 3.3]), slopes=Slopes(ends, by_gene))
    memory = clan.evolve(population, plan, fitness).population.memory
    return np.array([memory["centre"][name] for name in NAMES]), memory["moves"]


def test_every_group_moves_to_its_own_minimum_in_one_round():
    """Downward by the parabola in log rates, upward by that in rates, which is the nearer one."""
    best, curvature = np.array([-0.3, 0.2, -0.05]), np.array([2.0, 10.0, 4.0])
    centre, moves = decided(clan_of(), lambda x: curvature * (x - best))
    # f' = -0.2 x 10 and f'' = 10 over log k make the minimum of the parabola in k 1 + 2 / 12.
    assert centre == pytest.approx([-0.3, math.log(1 + 2 / 12), -0.05], abs=1e-9)
    assert {move["why"] for move in moves.values()} == {"minimum"}


def test_coupled_groups_fall_short_and_do_not_overshoot():
    """Two groups that do the same work: each sees the other's curvature as its own."""
    hessian, best = np.array([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 2.0]]), np.array([-0.3, 0.0, 0.0])
    centre, _ = decided(clan_of(), lambda x: hessian @ (x - best))
    gradient = hessian @ -best  # 0.6, 0.3, 0 at the centre
    assert centre == pytest.approx([-gradient[0] / 3, -gradient[1] / 3, 0.0], abs=1e-9)
    before, after = (0.5 * (x - best) @ hessian @ (x - best) for x in (np.zeros(3), centre))
    assert after < before


def test_without_curvature_a_group_moves_downhill_as_far_as_one_round_may():
    centre, moves = decided(clan_of(), lambda x: np.array([1.0, -1.0, 0.0]))
    # A loss that is level in log k and falls has its minimum over k at 2.
    assert centre == pytest.approx([-0.8, math.log(2), 0.0])
    assert [moves[name]["why"] for name in NAMES] == ["downhill", "minimum", "no decision: level"]


def test_a_slope_within_its_noise_is_taken_at_less_than_half():
    exact, _ = decided(clan_of(), lambda x: 2.0 * (x + 0.1))
    noisy, _ = decided(clan_of(), lambda x: 2.0 * (x + 0.1), noise=0.4)
    assert (noisy < 0).all() and (noisy > exact / 2).all()


def test_a_slope_that_is_not_finite_moves_nothing():
    centre, moves = decided(clan_of(), lambda x: np.array([math.nan, 2.0 * (x[1] + 0.1), 0.0]))
    assert centre == pytest.approx([0.0, -0.1, 0.0], abs=1e-9)
    assert moves["lr:a"]["why"] == "no decision: a slope is not finite"


def test_all_rates_vary_together_and_other_genes_have_rounds_of_their_own():
    clan = clan_of(WEIGHT_DECAY, DROPOUT)
    plans = [clan.plan(index, 100) for index in range(3)]
    assert [plan.explores for plan in plans] == [NAMES, ("weight_decay",), ("dropout",)]
    assert [plan.slopes for plan in plans] == [NAMES, (), ()]
    genomes = clan.init(START).genomes
    for genome in genomes:
        assert len({genome.values[name] for name in NAMES}) == 1
    low, high = slope_members(genomes, NAMES[0])
    values = [genome.values[NAMES[0]] for genome in genomes]
    assert (values[low], values[high]) == (min(values), max(values))


def test_the_trial_and_the_rounds_before_it_are_of_learning_rates():
    clan = clan_of(WEIGHT_DECAY, trial_cost=0.08)
    trial = clan._planner.trial
    assert clan.plan(1, 20).slopes == NAMES
    assert clan.plan(4, trial.start_step).slopes == () and clan.plan(4, trial.start_step).explores == NAMES


def test_slopes_of_groups_are_added_by_gene():
    tables = [np.array([[1.0, 2.0, 4.0]]), np.array([[8.0, 16.0, 32.0]])]
    genes = (replace(GENES[0], groups=("a", "c")), GENES[1], WEIGHT_DECAY)
    slopes = slopes_of((2, 0), tables, ("lr:a", "lr:b"), genes, ("a", "b", "c"))
    assert slopes.members == (2, 0)
    assert {name: table.tolist() for name, table in slopes.by_gene.items()} == {
        "lr:a": [[5.0], [40.0]],
        "lr:b": [[2.0], [16.0]],
    }


@pytest.mark.parametrize("genes", [(LR,), (GENES[0],), (LR, GENES[0]), (GENES[0], replace(GENES[0], name="lr:again"))])
def test_rates_that_are_not_of_groups_apart_are_refused(genes):
    with pytest.raises(ConfigError, match="two genes or more"):
        build("clan", facts(genes=genes), OPTIONS)


def test_only_a_clan_with_the_option_needs_slopes():
    assert clan_of().needs_slopes and not clan_of(group_slopes=False).needs_slopes
    assert clan_of(group_slopes=False).plan(0, 0).slopes == ()
