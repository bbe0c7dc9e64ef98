"""Every config of the repository is one that a clan takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from clantune_scale.config.batch import split_batch
from clantune_scale.config.deepspeed_file import extract, load_ds_config
from clantune_scale.config.gene_catalogue import build_gene
from clantune_scale.core.strategies import RunFacts, build

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_usable(path):
    ds_config, config = extract(load_ds_config(path))
    assert config is not None
    genes = tuple(build_gene(name, entry, found=1.0) for name, entry in config.genes.items())
    facts = RunFacts(
        config.population_size, genes, config.seed, config.round_length, config.duty_cycle, config.total_steps
    )
    build(config.strategy.name, facts, config.strategy.options)
    _, plan = split_batch(ds_config, population_size=config.population_size, dp_size=1)
    assert plan.clan_batch == ds_config["train_batch_size"]


def test_there_are_some():
    assert {"quickstart", "zero3_bf16", "classic", "specialized"} <= {path.stem for path in CONFIGS}
    assert {"pbt", "hdet", "halving"} <= {path.stem for path in CONFIGS}
