from __future__ import annotations

import math

import pytest

from clantune_scale.core.consensus import consensus, consensus_value, values_in_effect
from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.rounds import PhaseKind


def test_the_mean_is_taken_in_the_genes_scale():
    assert consensus_value([0.01, 1.0], Gene("lr")) == pytest.approx(0.1)
    assert consensus_value([0.1, 0.3], Gene("s", scale="linear", bounds=(0, 1))) == pytest.approx(0.2)
    beta = Gene("b", scale="logit", bounds=(0.1, 0.999), initial=0.9)
    assert consensus_value([0.9, 0.99], beta) == pytest.approx(1 / (1 + math.exp(-(math.log(9) + math.log(99)) / 2)))


def test_the_median_ignores_a_stray_member():
    gene = Gene("dropout", scale="linear", bounds=(0, 1), initial=0.1, consensus="median")
    assert consensus_value([0.1, 0.12, 0.9], gene) == pytest.approx(0.12)


def test_integer_genes_are_rounded_and_clipped_to_whole_numbers_inside_the_bounds():
    gene = Gene("accumulation", bounds=(1.5, 8.0), initial=2.0, integer=True)
    assert consensus_value([2.0, 3.0, 4.0], gene) == 3.0
    assert consensus_value([1.5, 1.5], gene) == 2.0


def test_equal_members_keep_their_value_to_the_last_bit():
    value = 0.1 + 0.2
    assert consensus_value([value] * 7, Gene("lr")) == value


def test_the_order_of_members_does_not_matter():
    genomes = [Genome({"lr": value}) for value in (0.1, 0.7, 0.013, 3.0)]
    assert consensus(genomes, [Gene("lr")]) == consensus(genomes[::-1], [Gene("lr")])


def test_only_specialized_genes_give_way_and_only_while_the_clan_cooperates():
    genes = (Gene("lr"), Gene("dropout", kind="specialized", scale="linear", bounds=(0, 1), initial=0.1))
    genomes = [Genome({"lr": 0.1, "dropout": 0.2}), Genome({"lr": 0.4, "dropout": 0.4})]
    cooperating = values_in_effect(genomes, genes, PhaseKind.COOPERATIVE)
    assert [one["lr"] for one in cooperating] == [0.1, 0.4]
    assert [one["dropout"] for one in cooperating] == pytest.approx([0.3, 0.3])
    assert values_in_effect(genomes, genes, PhaseKind.COMPETITIVE) == [dict(one.values) for one in genomes]
