"""What is known before a run: every error at once, and what follows where there are none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clantune_scale.planning.model_spec import LoadedModel
from clantune_scale.planning.preflight import preflight

DS = {
    "train_batch_size": 32,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.8, 0.95]}},
}


def _config(**block):
    return DS | {"clantune": {"population_size": 4, "total_steps": 100} | block}


def _model(*groups, dropout: float = 0.0) -> LoadedModel:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(dropout), nn.Linear(2, 2))
    named = [{"params": module[2 * i].parameters(), "name": name} for i, name in enumerate(groups)]
    return LoadedModel(module, named or [{"params": list(module.parameters())}])


def test_a_good_config_gives_topology_batch_genes_and_strategy():
    found = preflight(_config(genes=["lr", "beta1", "clip"]), world_size=8)
    assert (found.errors, found.warnings) == ([], [])
    assert found.topology.dp == 2 and found.batch.member_batch == 8
    assert {gene.name: gene.initial for gene in found.genes} == {"lr": 1.0, "beta1": 0.8, "clip": 1.0}
    assert found.strategy.facts.total_steps == 100


def test_all_errors_come_at_once():
    config = _config(genes={"lr": {"bounds": [2, 3]}, "wieght_decay": {}}, strategy="clann")
    config |= {"train_batch_size": 30, "elasticity": {}, "ClanTune": {}, "fp16": {"enabled": True}}
    errors = "\n".join(preflight(config, world_size=8).errors)
    for part in (
        "has a block 'ClanTune'",
        "'elasticity' was removed",
        "fp16 with ZeRO stage 0",
        "30 / (population_size(4) x dp(2)",
        "gene 'lr' starts at 1",
        "'wieght_decay', which is none of",
    ):
        assert part in errors.replace("gradient_accumulation_steps(1) x ", ""), part


def test_a_block_with_errors_still_has_its_ranks_checked():
    found = preflight(_config(rond_length=3, seed=-1), world_size=6)
    assert len(found.errors) == 3
    assert any("does not divide the 6 ranks" in error for error in found.errors)


def test_a_config_without_the_block_is_an_error():
    assert 'has no "clantune" block' in preflight(DS, world_size=4).errors[0]


def test_an_unknown_strategy_or_option_is_an_error():
    assert "there is no strategy 'clann'" in preflight(_config(strategy="clann"), world_size=4).errors[0]
    wrong = {"name": "clan", "options": {"groth": 1.0}}
    assert "Did you mean 'growth'" in preflight(_config(strategy=wrong), world_size=4).errors[0]


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({"enabled": False}, 4, "plain DeepSpeed"),
        ({"genes": ["lr", "dropout"], "duty_cycle": 0.0}, 4, "dropout is never in effect"),
        ({"population_size": 1}, 4, "a clan of one"),
        ({"total_steps": None}, 4, "genes never freeze"),
    ],
)
def test_what_seems_otherwise_than_it_is_is_warned_of(changes, world_size, message):
    found = preflight(_config(**changes), world_size=world_size)
    assert found.errors == [] and any(message in warning for warning in found.warnings)


def test_a_window_smaller_than_a_member_is_an_error():
    assert (
        "fitness.num_samples is 3, fewer than the 4"
        in preflight(_config(fitness={"num_samples": 3}), world_size=16).errors[0]
    )


def test_genes_bind_to_the_model_or_are_warned_of():
    genes = {"lr": {}, "dropout": {}, "momentum": {}, "lr:head": {"groups": ["head"]}, "weight_decay": {}}
    found = preflight(_config(genes=genes), world_size=4, model=_model("body", "head"))
    assert [gene.name for gene in found.genes] == ["lr", "dropout", "lr:head"]
    assert any("'momentum' has no effect: the optimizer has no momentum" in w for w in found.warnings)
    assert any("'weight_decay' has no effect: it multiplies weight_decay, which is 0" in w for w in found.warnings)
    lost = preflight(_config(genes={"lr:tail": {"groups": ["tail"]}}), world_size=4, model=_model("body", "head"))
    assert "no parameter group is called tail; there are body, head" in lost.warnings[0]


def test_a_model_without_dropout_and_a_gene_for_it():
    bare = LoadedModel(nn.Linear(2, 2), [{"params": list(nn.Linear(2, 2).parameters())}])
    found = preflight(_config(genes=["lr", "dropout"]), world_size=4, model=bare)
    assert any("the model has no dropout module" in warning for warning in found.warnings)


def test_a_gene_of_ones_own_needs_no_setter_here():
    own = {"kind": "optimizer", "scale": "linear", "bounds": [0, 1], "initial": 0.5}
    found = preflight(_config(genes={"lr": {}, "temperature": own}), world_size=4, model=_model())
    assert (found.errors, found.warnings) == ([], []) and found.genes[1].initial == 0.5


def test_experts_are_refused_where_deepspeed_refuses_them():
    moe = type("MoE", (nn.Module,), {"__module__": "deepspeed.moe.layer"})
    model = LoadedModel(nn.Sequential(nn.Linear(1, 1), moe()), [{"params": [nn.Parameter(torch.zeros(1))]}])
    for stage in (1, 3):
        config = _config() | {"zero_optimization": {"stage": stage}}
        errors = preflight(config, world_size=4, model=model).errors
        assert any("mixture-of-experts" in error for error in errors) == (stage == 3)


def test_inner_degrees_are_counted():
    tensor = preflight(_config() | {"tensor_parallel": {"autotp_size": 2}}, world_size=16)
    assert tensor.errors == [] and (tensor.topology.tp, tensor.topology.dp) == (2, 2)
    assert (tensor.batch.micro_batch, tensor.batch.clan_batch) == (2, 16)
    pipeline = preflight(_config() | {"pipeline": {"stages": 2}}, world_size=16)
    assert pipeline.errors == [] and (pipeline.topology.pp, pipeline.topology.dp) == (2, 2)
    assert (pipeline.batch.micro_batch, pipeline.batch.clan_batch) == (4, 32)


@pytest.mark.parametrize(
    ("optimizer", "tunes_decay"),
    [
        ({"type": "AdamW", "params": {"weight_decay": 0.1}}, True),
        ({"type": "Adam", "params": {"weight_decay": 0.1}}, True),
        ({"type": "Adam", "params": {"weight_decay": 0.1, "adam_w_mode": False}}, False),
        ({"type": "AdamW", "params": {"lr": 1e-3}}, False),
        ({"type": "AdamW", "params": {"torch_adam": True}}, True),  # torch's has a decay by default
        ({"type": "Lion", "params": {"weight_decay": 0.1}}, False),
        ({"type": "SGD", "params": {"weight_decay": 0.1}}, False),
        (None, True),  # the script's own, which may be anything
    ],
)
def test_weight_decay_may_join_the_genes_only_of_adamw_with_some(optimizer, tunes_decay):
    config = _config()
    config = config | {"optimizer": optimizer} if optimizer else {k: v for k, v in config.items() if k != "optimizer"}
    assert preflight(config, world_size=4).may_tune_weight_decay is tunes_decay
    named = config | {"clantune": {"population_size": 4, "genes": ["lr"]}}
    assert not preflight(named, world_size=4).may_tune_weight_decay


def test_weight_decay_of_a_models_own_groups_counts():
    model = _model("body", "head")
    assert not preflight(_config(), world_size=4, model=model).may_tune_weight_decay
    model.groups[1]["weight_decay"] = 0.1
    assert preflight(_config(), world_size=4, model=model).may_tune_weight_decay
