"""Pipeline members beyond the contract: evaluation leaves no trace, names of weights, genes that one stage binds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import clantune_scale
from clantune_scale.backends.deepspeed.pipeline import _RESTORED, PipelineBackend
from tests.backends.families.pipeline import Block, First, Pipeline, Twin, back, layers, squared_error
from tests.backends.small_runs import MICRO, ds_config, in_member_worlds
from tests.ranks import run_ranks
from tests.small_clans import clan_config, datasets


def _module(specs: list[Any], **options: Any) -> Any:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    options = {"num_stages": 2, "loss_fn": squared_error, "partition_method": "uniform", **options}
    return deepspeed.PipelineModule(specs, **options)


def _engine(config: dict, model: Any) -> Any:
    import deepspeed

    return deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]


def _batches(size: int) -> list[list[torch.Tensor]]:
    inputs, targets = datasets()[0][: 4 * size]
    return [[inputs[i : i + size], targets[i : i + size]] for i in range(0, 4 * size, size)]


def _evaluate(rank: int) -> dict[str, Any]:
    """Trains, evaluates batches of another size on the way, trains on; beside it, what the state was."""
    backend = PipelineBackend(_engine(ds_config(1, accumulation=2), _module(layers())))
    engine = backend.engine
    engine.train_batch(iter(_batches(MICRO)))
    before = {name: vars(engine).get(name) for name in _RESTORED}
    offset = engine.module.micro_offset
    with backend.evaluating():
        losses = [float(backend.batch_loss(batch, None)) for batch in _batches(MICRO + 3)]
        asked = float(backend.batch_loss(_batches(2)[0], lambda engine, batch: engine.eval_batch(iter([batch]))))
    found = {
        "kept": all(vars(engine).get(name) is before[name] for name in _RESTORED),
        "offset": engine.module.micro_offset == offset,
        "mode": engine.module.training,
        "losses": losses,
        "asked": asked,
    }
    weights = Pipeline(engine).weights()
    engine.train_batch(iter(_batches(MICRO)))
    return found | {"weights": weights, "steps": engine.global_steps, "after": Pipeline(engine).weights()}


def _train_only(rank: int) -> Any:
    engine = _engine(ds_config(1, accumulation=2), _module(layers()))
    for _ in range(2):
        engine.train_batch(iter(_batches(MICRO)))
    return Pipeline(engine).weights()


def test_evaluation_tells_all_stages_the_loss_and_leaves_no_trace():
    results = run_ranks(2, in_member_worlds, _evaluate)
    undisturbed = run_ranks(2, in_member_worlds, _train_only)[0]
    twin = Twin()
    twin.load_state_dict(results[0]["weights"])
    expected = [squared_error(twin(inputs), targets).item() for inputs, targets in _batches(MICRO + 3)]
    for found in results:
        assert found["kept"] and found["offset"] and found["mode"] and found["steps"] == 2
        assert found["losses"] == pytest.approx(expected, rel=1e-6)
        assert found["asked"] == pytest.approx(squared_error(*_outputs(twin, 2)).item(), rel=1e-6)
        assert all(torch.equal(found["after"][name], undisturbed[name]) for name in undisturbed)


def _outputs(twin: nn.Module, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, targets = _batches(size)[0]
    return twin(inputs), targets


class Biased(First):
    """Its weight is tied; its bias is each stage's own."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(16))
        self.register_buffer("scale", torch.ones(2))


def back_biased(first: Biased, hidden: torch.Tensor) -> torch.Tensor:
    return back(first, hidden) + first.bias


def _full_weights(rank: int) -> dict[str, list[int]] | None:
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    specs = [
        TiedLayerSpec("first", Biased),
        *(LayerSpec(Block, seed) for seed in (1, 2)),
        TiedLayerSpec("first", Biased, forward_fn=back_biased),
        LayerSpec(Block, 4, 16, 8),
    ]
    found = PipelineBackend(_engine(ds_config(1), _module(specs))).full_weights()
    return None if found is None else {name: list(tensor.shape) for name, tensor in found.items()}


def test_weights_are_whole_with_one_rank_of_each_stage_and_no_name_twice():
    stages = run_ranks(4, in_member_worlds, _full_weights)
    assert [stage is None for stage in stages] == [False, True, False, True]
    assert stages[0] == {
        "tied_modules.first.weight": [24, 16], "tied_modules.first.bias": [16], "tied_modules.first.scale": [2],
        "1.linear.weight": [24, 24], "1.linear.bias": [24], "2.linear.weight": [24, 24], "2.linear.bias": [24],
    }  # fmt: skip
    # The tied weight is the first stage's; what the last one keeps to itself goes by its layer's number.
    assert stages[2] == {"3.bias": [16], "3.scale": [2], "4.linear.weight": [8, 16], "4.linear.bias": [8]}


class Dropped(Block):
    """A block with dropout: on the last stage alone."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.drop = nn.Dropout(0.0)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(self.drop(hidden))


def _genes(rank: int, config: dict) -> dict[str, Any]:
    from deepspeed.pipe import LayerSpec

    clantune_scale.join(config)
    model = _module(
        [LayerSpec(Block, 0, 16, 24), LayerSpec(Block, 1), LayerSpec(Block, 2), LayerSpec(Dropped, 4, 24, 8)]
    )
    groups = [
        {"params": [p for p in model.parameters() if p.dim() == dim], "name": name}
        for dim, name in ((2, "matrices"), (1, "biases"))
    ]
    train, valid = datasets()
    engine = clantune_scale.initialize(
        model=model, model_parameters=groups, config=config, training_data=train, eval_data=valid
    )[0]
    accumulated, rates, dropped = set(), set(), set()
    while engine.global_steps < 20:
        engine.train_batch()
        accumulated.add(engine.micro_batches)
        dropped |= {part.p for part in engine.module.modules() if isinstance(part, nn.Dropout)}
    clan = engine.clan
    with clan.expression.during_update():
        rates = {group["name"]: group["lr"] for group in clan.backend.param_groups()}
    lineage = [(record.donors, record.losses) for record in clan.progress.lineage]
    return {
        "genes": [gene.name for gene in clan.genes], "rates": rates, "accumulated": accumulated, "dropped": dropped,
        "clip": clan.backend.clip, "genome": dict(clan.genome.values), "lineage": lineage,
        "population": [dict(genome.values) for genome in clan.population.genomes],
    }  # fmt: skip


def test_every_stage_has_the_same_genes_and_expresses_its_own_share(tmp_path):
    genes = {
        "lr": {"step_size": 0.3},
        "lr:biases": {"target": "lr", "groups": ["biases"], "step_size": 0.3},
        "clip": {"step_size": 0.3},
        "accumulation": {"bounds": [1, 4], "step_size": 0.5},
        "dropout": {"initial": 0.2, "bounds": [0.0, 0.4]},
    }
    config = clan_config(
        tmp_path, ds_config(1, accumulation=2, clip=0.5), genes=genes, strategy="classic", duty_cycle=0.4
    )
    results = run_ranks(4, in_member_worlds, _genes, config)
    for found in results:
        assert found["genes"] == list(genes)
        assert found["population"] == results[0]["population"] and found["lineage"] == results[0]["lineage"]
        genome = found["genome"]
        assert found["rates"]["matrices"] == pytest.approx(1e-2 * genome["lr"], rel=1e-6)
        assert found["rates"]["biases"] == pytest.approx(1e-2 * genome["lr"] * genome["lr:biases"], rel=1e-6)
    for first, last in (results[:2], results[2:]):
        assert first["accumulated"] == last["accumulated"] and first["clip"] == last["clip"]
        assert first["dropped"] == set() and len(last["dropped"]) > 1
    assert len(results[0]["accumulated"] | results[2]["accumulated"]) > 1


def _three_stages(rank: int, config: dict) -> Any:
    clantune_scale.join(config)
    train, valid = datasets()
    model = _module(layers(), num_stages=3)
    engine, _, loader, _ = clantune_scale.initialize(
        model=model, model_parameters=list(model.parameters()), config=config, training_data=train, eval_data=valid
    )
    while engine.global_steps < 7:
        engine.train_batch()
    return loader.state_dict(), list(engine.clan.fitness.mean), Pipeline(engine).weights()


def test_a_stage_in_the_middle_counts_the_data_along_and_knows_the_losses(tmp_path):
    config = clan_config(tmp_path, ds_config(1, accumulation=2), population_size=1, strategy="control")
    results = run_ranks(3, in_member_worlds, _three_stages, config)
    for state, losses, _ in results:
        assert (state, losses) == (results[0][0], results[0][1]) and state["step"] == 7
