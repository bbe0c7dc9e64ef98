"""From a name and an entry to a gene, and what is said where that cannot be."""

from __future__ import annotations

import pytest

from clantune_scale.config.gene_catalogue import CATALOGUE, build_gene
from clantune_scale.config.schema import GeneConfig
from clantune_scale.errors import ConfigError


def test_relative_gene_starts_at_one_whatever_the_engine_has():
    gene = build_gene("lr", GeneConfig(), found=3e-4)
    assert gene.initial == 1.0 and gene.relative and gene.scale == "log" and gene.bounds == (1e-3, 1e3)


def test_absolute_gene_starts_where_the_engine_is():
    gene = build_gene("beta2", GeneConfig(), found=0.95)
    assert gene.initial == 0.95 and not gene.relative and gene.scale == "logit"


def test_own_initial_goes_before_the_engine():
    assert build_gene("dropout", GeneConfig(initial=0.2), found=0.0).initial == 0.2


def test_every_key_overrides_the_catalogue():
    config = GeneConfig(
        kind="specialized", scale="linear", bounds=(0.0, 2.0), initial=0.5, step_size=0.2, max_change=0.3,
        consensus="median", integer=True, mode="absolute", groups=["head"],
    )  # fmt: skip
    gene = build_gene("lr:head", config)
    assert (gene.name, gene.target, gene.groups) == ("lr:head", "lr", ("head",))
    assert (gene.kind, gene.scale, gene.bounds, gene.initial) == ("specialized", "linear", (0.0, 2.0), 0.5)
    assert (gene.step_size, gene.max_change, gene.consensus, gene.integer) == (0.2, 0.3, "median", True)
    assert not gene.relative


def test_absolute_learning_rate_does_not_inherit_the_bounds_of_a_factor():
    gene = build_gene("lr", GeneConfig(mode="absolute"), found=1e-4)
    assert gene.initial == 1e-4 and gene.bounds[0] < 1e-4


def test_what_acts_on_the_gradient_is_specialized():
    assert {name for name, gene in CATALOGUE.items() if gene.kind == "specialized"} == {"accumulation", "dropout"}


def test_accumulation_is_whole_and_its_consensus_a_median():
    gene = build_gene("accumulation", GeneConfig(), found=2)
    assert gene.integer and gene.consensus == "median" and gene.expressed(2.6) == 3.0


@pytest.mark.parametrize(
    ("name", "config", "found", "parts"),
    [
        ("clip", {}, 0.0, ["'clip' starts at 0 (the engine's own value)", "[0.001, 1000]", "genes.clip.bounds"]),
        ("dropout", {"initial": 0.9}, None, ["starts at 0.9 (genes.dropout.initial)", "[0, 0.5]"]),
        ("clip", {}, None, ["no value to start from", "Set genes.clip.initial"]),
        ("lr:head", {}, None, ["'lr:head' has a label and no parameter groups", '"groups"']),
        ("learning_rate", {}, None, ["'learning_rate', which is none of lr,", "kind, scale, bounds, initial"]),
        ("weight_decy", {}, None, ["Did you mean 'weight_decay'?"]),
        ("smoothing", {"kind": "specialized", "initial": 0.1}, None, ["register a setter and add scale, bounds to"]),
        ("beta1", {"bounds": (0.5, 1.5)}, 0.9, ["logit scale", "[0.5, 1.5]"]),
    ],
)
def test_gene_that_cannot_be_built(name, config, found, parts):
    with pytest.raises(ConfigError) as error:
        build_gene(name, GeneConfig(**config), found=found)
    for part in parts:
        assert part in str(error.value)


def test_registered_gene_is_complete_with_four_keys():
    config = GeneConfig(kind="specialized", scale="linear", bounds=(0.0, 0.4), initial=0.1)
    gene = build_gene("label_smoothing", config)
    assert gene.target == "label_smoothing" and gene.kind == "specialized" and not gene.relative
