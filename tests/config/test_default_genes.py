"""Weight decay is a gene by default where a round can show what it is good for, on every engine alike."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clantune_scale.config.deepspeed_file import parse_block
from clantune_scale.config.default_genes import ADAMW, default_genes, genes_of, update_rule

FACTS = {"sees_samples_once": True, "optimizer": ADAMW, "weight_decays": [0.0, 0.1]}


@pytest.mark.parametrize(
    ("strategy", "changes", "tunes_decay"),
    [
        ("clan", {}, True),
        ("pbt", {}, False),
        ("clan", {"sees_samples_once": False}, False),
        ("clan", {"optimizer": "sgd"}, False),
        ("clan", {"optimizer": "lion"}, False),
        ("clan", {"optimizer": "adam"}, False),
        ("clan", {"weight_decays": [0.0, 0.0]}, False),
        ("clan", {"weight_decays": []}, False),
    ],
)
def test_weight_decay_is_a_gene_only_where_it_acts(strategy, changes, tunes_decay):
    assert default_genes(strategy, **FACTS | changes) == (("lr", "weight_decay") if tunes_decay else ("lr",))


@pytest.mark.parametrize(
    ("block", "genes"),
    [
        ({}, ["lr", "weight_decay"]),
        ({"genes": ["lr"]}, ["lr"]),
        ({"genes": ["lr", "clip"]}, ["lr", "clip"]),
        ({"strategy": "pbt"}, ["lr"]),
    ],
)
def test_what_a_user_names_is_kept(block, genes):
    config = parse_block({"population_size": 4, **block})
    assert list(genes_of(config, **FACTS)) == genes
    smaller = config.model_copy(update={"population_size": 3})  # as where members have died
    assert list(genes_of(smaller, **FACTS)) == genes


def _torch(kind, **options):
    return kind([nn.Parameter(torch.zeros(2))], lr=0.1, **options)


class FusedAdam(torch.optim.SGD):
    """What Apex, DeepSpeed and Transformer Engine call theirs; its flag says how it decays."""

    adam_w_mode = 1


class PlainFusedAdam(FusedAdam):
    adam_w_mode = 0


class DeepSpeedCPUAdam(FusedAdam):
    adam_w_mode = True


class AdamW8bit(torch.optim.SGD):
    """A library's whose groups and attributes say nothing."""


class Lion(torch.optim.SGD): ...


class Mine(torch.optim.AdamW): ...


@pytest.mark.parametrize(
    ("optimizer", "rule"),
    [
        (_torch(torch.optim.AdamW), ADAMW),
        (_torch(Mine), ADAMW),
        (_torch(torch.optim.Adam), "adam"),
        (_torch(torch.optim.Adam, decoupled_weight_decay=True), ADAMW),
        (_torch(torch.optim.SGD, weight_decay=0.1), "sgd"),
        (_torch(torch.optim.Adamax), "adamax"),
        (_torch(torch.optim.RMSprop), "rmsprop"),
        (_torch(FusedAdam), ADAMW),
        (_torch(PlainFusedAdam), "plainfusedadam"),
        (_torch(DeepSpeedCPUAdam), ADAMW),
        (_torch(AdamW8bit), ADAMW),
        (_torch(Lion), "lion"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
def test_adamw_is_told_by_what_it_does_whoever_made_it(optimizer, rule):
    assert update_rule(optimizer) == rule
