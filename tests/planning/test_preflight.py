"""What is known before a run: every error at once, and what follows where there are none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clantune_scale.core.line import DecayRule
from clantune_scale.planning.configured_optimizer import ConfiguredOptimizer
from clantune_scale.planning.model_spec import LoadedModel
from clantune_scale.planning.preflight import preflight
from clantune_scale.runtime.line.decays import decay_rule
from clantune_scale.runtime.line.refusals import refusals

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


def test_on_the_line_ranks_and_batch_are_those_of_one_model():
    found = preflight(_config(members="line", strategy="control") | {"train_batch_size": 36}, world_size=6)
    assert (found.errors, found.warnings) == ([], [])
    assert (found.topology.population_size, found.topology.dp) == (1, 6)
    assert (found.batch.clan_batch, found.batch.member_batch, found.batch.dp_size) == (36, 36, 6)
    assert found.ranks == "4 members on the line of one model: dp 6 x pp 1 x tp 1 = 6 ranks"
    assert "does not divide the 6 ranks" in preflight(_config(strategy="control"), world_size=6).errors[0]


def test_on_the_line_the_window_is_divided_among_all_ranks():
    config = _config(members="line", fitness={"num_samples": 15})
    assert "fewer than the 16 data-parallel ranks, each" in preflight(config, world_size=16).errors[0]
    assert preflight(config, world_size=8).errors == []


class _Engine:
    """What a real optimizer says of itself, to the checks of a run."""

    def __init__(self, kind, **settings) -> None:
        self._optimizer = kind([nn.Parameter(torch.zeros(1))], **settings)

    def decay_rules(self):
        return [decay_rule(self._optimizer, group) for group in self._optimizer.param_groups]

    def optimizer_name(self):
        return type(self._optimizer).__name__


COUPLED = {"type": "Adam", "params": {"lr": 1e-3, "weight_decay": 0.1, "adam_w_mode": False}}


@pytest.mark.parametrize(
    ("block", "optimizer", "said"),
    [
        ({"strategy": "pbt"}, None, "'pbt' lets members hold states of their own"),
        ({"strategy": {"name": "control", "options": {"competes": True}}}, None, "states of their own"),
        ({"faults": {"min_members": 2}}, None, "faults.min_members is 2"),
        ({"genes": ["lr", "accumulation"]}, None, "gene 'accumulation'"),
        ({"genes": ["lr", "beta1"]}, None, "effect of 'beta1' on an update has no closed form"),
        ({"genes": ["lr", "clip"]}, None, "effect of 'clip' on an update has no closed form"),
        ({"genes": ["lr", "weight_decay"]}, COUPLED, "Adam does not apply its weight decay by a rule"),
    ],
    ids=["pbt", "competing control", "min_members", "accumulation", "beta1", "clip", "coupled decay"],
)
def test_what_the_line_cannot_do_is_refused_with_the_sentences_of_a_run(block, optimizer, said):
    config = _config(members="line", **block) | ({"optimizer": optimizer} if optimizer else {})
    found = preflight(config, world_size=4)
    engine = _Engine(torch.optim.Adam if optimizer else torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
    assert found.errors == list(refusals(found.block, found.strategy, found.genes, engine, setters=()))
    assert len(found.errors) == 1 and said in found.errors[0]
    assert preflight(_config(**block) | ({"optimizer": optimizer} if optimizer else {}), world_size=4).errors == []


def test_a_gene_with_a_setter_is_refused_on_the_line():
    own = {"kind": "optimizer", "scale": "linear", "bounds": [0, 1], "initial": 0.5}
    errors = preflight(_config(members="line", genes={"lr": {}, "temperature": own}), world_size=4).errors
    assert len(errors) == 1 and "effect of 'temperature' on an update is set by a function of yours" in errors[0]


def test_all_that_the_line_cannot_do_comes_at_once():
    block = {"strategy": "pbt", "faults": {"min_members": 2}, "genes": ["lr", "beta1", "clip"]}
    assert len(preflight(_config(members="line", **block), world_size=4).errors) == 4


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("AdamW", {"weight_decay": 0.1}),
        ("SGD", {"weight_decay": 0.1}),
        ("SGD", {"weight_decay": 0.1, "momentum": 0.9, "nesterov": True}),
        ("SGD", {"weight_decay": 0.1, "momentum": 0.9, "dampening": 0.1}),
        ("Adagrad", {"weight_decay": 0.1}),
        ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
        ("NAdam", {"weight_decay": 0.1}),
        ("RMSprop", {"weight_decay": 0.1}),
    ],
)
def test_a_config_says_of_a_decay_what_the_optimizer_itself_does(kind, params):
    configured = ConfiguredOptimizer({"optimizer": {"type": kind, "params": {"lr": 1e-3, **params}}})
    engine = _Engine(getattr(torch.optim, kind), lr=1e-3, **params)
    assert configured.decay_rules() == engine.decay_rules()
    assert configured.optimizer_name() == engine.optimizer_name()


def test_a_scripts_own_optimizer_may_have_any_decay():
    assert ConfiguredOptimizer({}).decay_rules() == [DecayRule()]
    config = _config(members="line", genes=["lr", "weight_decay"])
    del config["optimizer"]
    assert preflight(config, world_size=4).errors == []


def test_a_loop_is_warned_of_turns_only_if_members_compete():
    (warning,) = preflight(_config(members="line", total_steps=1000), world_size=4).warnings
    assert "takes them by itself if its loss is the model's own" in warning
    assert "clan.steps(loader); or pass train_step" in warning
    without = {"name": "clan", "options": {"trial_cost": 0}}
    assert preflight(_config(members="line", strategy=without, total_steps=1000), world_size=4).warnings == []
    assert preflight(_config(total_steps=1000), world_size=4).warnings == []
