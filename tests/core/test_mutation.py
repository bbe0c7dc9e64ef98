from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from clantune_scale.core import mutation
from clantune_scale.core.genome import Gene, Genome

LR = Gene("lr", step_size=0.1)
BETA = Gene("beta1", scale="logit", bounds=(0.5, 0.999), initial=0.9, step_size=0.2)
SMOOTHING = Gene("smoothing", scale="linear", bounds=(0.0, 0.2), initial=0.1, step_size=0.01)

# Of the tests for bias: draws, false-alarm rate, and the bias to be found, in step sizes (or in tau).
NUM_DRAWS, ALPHA, BIAS = 4000, 1e-3, 0.1
TAU = 0.3
#: Standard deviation of a change in step sizes, exp(TAU N) N' with independent normals.
SPREAD = math.exp(TAU**2)


def test_draws_depend_on_every_part_of_the_key_and_on_nothing_else():
    key = (1, 2, 3, "lr")
    first = mutation.normal(*key)
    others = {mutation.normal(*other) for other in [(2, 2, 3, "lr"), (1, 3, 3, "lr"), (1, 2, 4, "lr"), (1, 2, 3, "wd")]}
    assert mutation.normal(*key) == first
    assert len(others | {first}) == 5


def test_draws_are_pinned_so_that_a_resume_after_an_upgrade_of_numpy_draws_the_same():
    assert mutation.uniform(0, 0, 0, "lr") == 0.6291847863543705


def test_uniforms_are_uniform_and_normals_normal():
    # 4,000 draws: a Kolmogorov-Smirnov distance of 0.03 would be seen with power above 0.9 at the level 0.001.
    u = mutation.uniforms(5, 0, mutation.CLAN, "a", count=4000)
    z = [mutation.normal(5, r, m, "a") for r in range(100) for m in range(40)]
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert stats.kstest(z, "norm").pvalue > 1e-3


def test_a_permutation_holds_each_number_once_and_varies():
    orders = [mutation.permutation(0, r, mutation.CLAN, "order", count=6) for r in range(5)]
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len(set(orders)) > 1


def _children(gene: Gene) -> tuple[np.ndarray, np.ndarray]:
    """[NUM_DRAWS] each, of as many children of one parent: step sizes and changes in the gene's scale."""
    parent = Genome.initial([gene])
    rounds, members = NUM_DRAWS // 40, 40
    children = [
        mutation.mutate(parent, [gene], seed=3, round_=r, member=m) for r in range(rounds) for m in range(members)
    ]
    values = np.array([gene.encode(child.values[gene.name]) for child in children])
    return np.array([child.step_sizes[gene.name] for child in children]), values - gene.encode(gene.initial)


def _is_biased(draws: np.ndarray) -> bool | np.ndarray:
    """[...] whether the mean of [..., NUM_DRAWS] differs from 0, by Student's t, two-sided at the level ALPHA."""
    return stats.ttest_1samp(draws, 0.0, axis=-1).pvalue < ALPHA


@pytest.mark.parametrize("gene", [LR, BETA, SMOOTHING], ids=lambda gene: gene.scale)
def test_mutation_is_unbiased_in_the_genes_own_scale(gene: Gene):
    """Two t tests with a false-alarm rate of 0.001 each, which find a bias of BIAS with a power above 0.99.

    That is a drift of a tenth of a step size per mutation in the value, or of a tenth of tau in the logarithm of the
    step size. Both rates are checked below; here, that the same tests reject the same draws with the bias in them.
    """
    steps, changes = _children(gene)
    changes, logs = changes / gene.step_size, np.log(steps / gene.step_size) / TAU
    assert not _is_biased(changes)
    assert not _is_biased(logs)
    assert all(_is_biased(draws + bias) for draws in (changes, logs) for bias in (-BIAS, BIAS))
    # The standard deviation of a standard deviation from so many draws is 1.5 %; of these tails, about 2 %.
    assert changes.std() == pytest.approx(SPREAD, rel=0.06)


def test_a_mutation_that_is_unbiased_in_another_scale_is_found():
    """Factors whose mean is 1 pull the logarithm down by half a variance: 0.24 step sizes where those are 0.4."""
    gene = Gene("lr", step_size=0.4, max_change=10.0, bounds=(1e-4, 1e4))
    steps, changes = _children(gene)
    assert not _is_biased(changes / gene.step_size)
    assert _is_biased((changes - steps**2 / 2) / gene.step_size)


def test_the_bias_tests_have_the_error_rates_that_they_state():
    """By the noncentral t distribution, and over 1,000 repetitions on draws of the distribution that mutation has."""
    freedom = NUM_DRAWS - 1
    critical = stats.t.isf(ALPHA / 2, freedom)
    assert stats.nct.sf(critical, freedom, BIAS / SPREAD * math.sqrt(NUM_DRAWS)) > 0.99
    rng = np.random.default_rng(0)
    found, alarms, repetitions = 0, 0, 1000
    for _ in range(repetitions):
        draws = np.exp(TAU * rng.standard_normal(NUM_DRAWS)) * rng.standard_normal(NUM_DRAWS)
        alarms += bool(_is_biased(draws))
        found += bool(_is_biased(draws + BIAS))
    # Of 1,000, a rate of 0.001 gives 6 or more once in 1,700 times, one of 0.99 as few as 978 once in 1,500.
    assert alarms < 6
    assert found > 978


def test_the_value_is_drawn_with_the_new_step_size():
    child = mutation.mutate(Genome.initial([LR]), [LR], seed=0, round_=4, member=2, tau=1.0)
    z = mutation.normal(0, 4, 2, "value:lr")
    assert child.step_sizes["lr"] != LR.step_size
    assert math.log(child.values["lr"]) == pytest.approx(child.step_sizes["lr"] * z, rel=1e-12)


def test_changes_are_capped_and_bounds_reflect():
    capped = Gene("lr", step_size=5.0, max_change=0.3)
    narrow = Gene("lr", bounds=(0.9, 1.1), step_size=5.0, max_change=5.0)
    for member in range(50):
        child = mutation.mutate(Genome.initial([capped]), [capped], seed=1, round_=0, member=member)
        assert abs(math.log(child.values["lr"])) <= 0.3 + 1e-12
        inside = mutation.mutate(Genome.initial([narrow]), [narrow], seed=1, round_=0, member=member).values["lr"]
        assert 0.9 <= inside <= 1.1
        assert inside not in (0.9, 1.1)


def test_step_sizes_stay_between_their_limits_and_other_genes_are_inherited():
    genome = Genome({"lr": 1.0, "wd": 0.5}, {"lr": 0.1, "wd": 0.1})
    for member in range(30):
        child = mutation.mutate(genome, [LR], seed=1, round_=0, member=member, tau=9.0, min_step=0.5, max_step=2.0)
        assert 0.05 <= child.step_sizes["lr"] <= 0.2
        assert (child.values["wd"], child.step_sizes["wd"]) == (0.5, 0.1)
