"""``clantune_scale.initialize``: ways to pass a config, what is refused, and runs in which something goes wrong."""

from __future__ import annotations

import base64
import json
import math
import os
from types import SimpleNamespace

import deepspeed
import hjson
import pytest
import torch
from torch.utils.data import IterableDataset, Subset

import clantune_scale
from clantune_scale.distributed import world
from clantune_scale.errors import ClanError, ConfigError
from clantune_scale.tracking import read_events
from tests.backends.small_runs import Net, ds_config, in_member_worlds
from tests.ranks import run_ranks
from tests.small_clans import clan_config, datasets, start, train

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def said(call, *args, **kwargs) -> str:
    """The kind and text of the error that a call ends in; nothing where it succeeds."""
    try:
        call(*args, **kwargs)
    except ClanError as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(100))


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, r"there is no DeepSpeed config\. Pass config=\.\.\., or --deepspeed_config FILE"),
        ({"args": SimpleNamespace(deepspeed_config=None)}, "there is no DeepSpeed config"),
        ({"config": {"clantune": {"population_size": 2}}}, "there are none. Pass eval_data=... to initialize()"),
        ({"config": {"clantune": {}}, "eval_data": [1]}, "population_size"),
        ({"config": {"clan_tune": {}}, "eval_data": [1]}, "Rename it to 'clantune'"),
        (
            {"config": {"clantune": {"population_size": 2}}, "eval_data": [1], "training_data": Stream()},
            "training_data is a Stream without a length.*Pass a map-style dataset",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_joined(options, message, monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=message):
        clantune_scale.initialize(model=Net(), **options)


def _without_a_clan(rank, directory):
    # Plain DeepSpeed compiles this one on its first use, for a minute, and waits for ever for one who was killed there.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    launched = {name: os.environ[name] for name in LAUNCHED}
    found = []
    for block in ({}, {"clantune": {"population_size": 2, "enabled": False}}):
        path = os.path.join(directory, f"rank{rank}.json")
        with open(path, "w") as file:
            json.dump(ds_config(1) | block, file)
        for options in ({"config": ds_config(1) | block}, {"args": SimpleNamespace(deepspeed_config=path)}):
            model = Net()
            engine, optimizer, loader, _ = clantune_scale.initialize(
                model=model, model_parameters=model.parameters(), training_data=datasets()[0], **options
            )
            found.append((
                hasattr(engine, "clan"), world.current(), {name: os.environ[name] for name in LAUNCHED} == launched,
                type(engine).__name__, optimizer is engine.optimizer, type(loader).__name__,
                torch.distributed.get_world_size(),
                [name for name in ("step", "backward", "allreduce_bucket") if name in vars(engine)],
            ))  # fmt: skip
    return found


def test_without_the_block_or_disabled_it_is_plain_deepspeed(tmp_path):
    plain = (False, None, True, "DeepSpeedEngine", True, "DeepSpeedDataLoader", 2, [])
    assert run_ranks(2, in_member_worlds, _without_a_clan, str(tmp_path)) == [[plain] * 4] * 2


def _forms_and_refusals(rank, config, directory):
    train_set, valid = datasets()
    # The same config, however it is passed; none is left with the block in it or changed.
    text = json.dumps(config)
    path, hjson_path = (os.path.join(directory, f"{rank}.{kind}") for kind in ("json", "hjson"))
    with open(path, "w") as file, open(hjson_path, "w") as hjson_file:
        file.write(text)
        hjson_file.write("# a comment\n" + hjson.dumps(config))
    args = SimpleNamespace(deepspeed_config=path, local_rank=int(os.environ["LOCAL_RANK"]))
    refused = {"ranks": said(start, config | {"clantune": config["clantune"] | {"population_size": 3}})}
    forms = []
    for options in (
        {"config": config}, {"config": path}, {"config": hjson_path}, {"args": args}, {"config_params": config},
        {"config": base64.urlsafe_b64encode(text.encode()).decode()},
    ):  # fmt: skip
        model = Net()
        engine, _, loader, _ = clantune_scale.initialize(
            model=model, model_parameters=model.parameters(), training_data=train_set, eval_data=valid, **options
        )
        forms.append((engine.clan.config, engine.train_batch_size(), "clantune" in engine._config._param_dict))
        assert engine.training_dataloader is loader
        train(engine, loader, 1)
        engine.clan.finish()
    assert args.deepspeed_config == path and json.loads(text) == config

    def with_batch(size):
        return {k: v for k, v in config.items() if k != "train_micro_batch_size_per_gpu"} | {"train_batch_size": size}

    def begin_with(training_data):
        model = Net()
        data = {"training_data": training_data, "eval_data": valid}
        clantune_scale.initialize(model=model, model_parameters=model.parameters(), config=config, **data)

    refused |= {
        "empty": said(begin_with, Subset(train_set, [])),
        "few": said(begin_with, Subset(train_set, range(7))),
        "no examples": said(start, config, eval_data=Subset(valid, [])),
        "batch": said(start, with_batch(9)),
        "product": said(start, config | {"train_batch_size": 16}),
    }
    return forms, refused


def test_every_form_of_config_is_taken_and_what_does_not_divide_is_refused(tmp_path):
    config = clan_config(tmp_path)
    results = run_ranks(2, in_member_worlds, _forms_and_refusals, config, str(tmp_path))
    for forms, refused in results:
        assert forms == [(forms[0][0], 4, False)] * 6 and forms[0][0].population_size == 2
        assert refused["ranks"].startswith(
            "TopologyError: population_size(3) x pp(1) x tp(1) = 3 does not divide the 2 ranks"
        )
        small = (
            "which is less than one micro-batch of every rank: population_size(2) x dp(1) x micro_batch(4) = 8. "
            "Use more data"
        )
        assert refused["empty"].startswith("ConfigError: the dataset has 0 samples, " + small)
        assert refused["few"].startswith("ConfigError: the dataset has 7 samples, " + small)
        assert refused["no examples"].startswith("ConfigError: eval_data has 0 examples")
        assert "9 / 2 leaves a rest of 1. Set train_batch_size to 8 or 10" in refused["batch"]
        assert "= 8, but train_batch_size is 16" in refused["product"]


class Losses:
    """An ``evaluate`` that is told each member's loss: ``table(evaluation, member)``; evaluation 0 is the start's."""

    BATCHES = 8  # of 8 examples, in the window of 64

    def __init__(self, table) -> None:
        self._table = table
        self._num_calls = 0

    def __call__(self, engine, batch) -> float:
        evaluation = self._num_calls // self.BATCHES
        self._num_calls += 1
        return self._table(evaluation, world.current().member)


def _all_nan(rank, config):
    nan = float("nan")
    at_start = said(start, config, evaluate=Losses(lambda number, member: nan))
    # The second round's losses are not finite: back to the state at the end of the first.
    engine, loader = start(config, evaluate=Losses(lambda number, member: nan if number == 2 else 5.0 - number))
    train(engine, loader, 5)
    good, before = engine.module.first.weight.detach().clone(), engine.clan.population.memory["centre"]["lr"]
    train(engine, loader, 10)
    after = engine.clan.population.memory["centre"]["lr"]
    restored = torch.equal(engine.module.first.weight, good)
    train(engine, loader, 15)
    lineage = [(record.restored, list(record.donors)) for record in engine.clan.progress.lineage]
    went_on = not torch.equal(engine.module.first.weight, good)
    engine.clan.finish()

    without_rates = config | {"clantune": config["clantune"] | {"genes": ["beta1"]}}
    engine, loader = start(without_rates, evaluate=Losses(lambda number, member: nan if number == 2 else 5.0 - number))
    helpless = said(train, engine, loader, 15)
    return at_start, restored, went_on, after - before, lineage, helpless, engine.global_steps


def test_when_no_member_is_finite_the_clan_goes_back_or_says_why_it_cannot(tmp_path):
    results = run_ranks(2, in_member_worlds, _all_nan, clan_config(tmp_path))
    for at_start, restored, went_on, change, lineage, helpless, steps in results:
        assert at_start.startswith("EvaluationError: the validation loss before the first step is not finite")
        assert restored and went_on and change == pytest.approx(-math.log(3))
        assert [was_restored for was_restored, _ in lineage] == [False, True, False]
        assert lineage[1][1] == [0, 1]
        assert helpless.startswith("EvaluationError: round 1: no member's validation loss is finite, and there is no")
        assert "Start from a configuration that trains." in helpless and steps == 10


def _one_nan(rank, config, strategy):
    block = config | {"clantune": config["clantune"] | {"strategy": strategy, "population_size": 3}}
    table = Losses(lambda number, member: float("nan") if member == 1 and number else 5.0 - number - 0.1 * member)
    engine, loader = start(block, evaluate=table)
    train(engine, loader, 10)
    summary = engine.clan.finish()
    return [list(record.donors) for record in engine.clan.progress.lineage], summary.champion


def _one_nan_each(rank, config):
    return [_one_nan(rank, config, strategy) for strategy in ("clan", "classic", "control")]


def test_a_member_that_is_not_finite_is_replaced_and_never_donates(tmp_path):
    config = clan_config(tmp_path)
    config["clantune"]["duty_cycle"] = 0.0
    for outcomes in run_ranks(3, in_member_worlds, _one_nan_each, config):
        for donors, champion in outcomes:
            assert len(donors) == 2 and all(by_member[1] != 1 and 1 not in by_member for by_member in donors)
            assert champion == 2


def _without_mlflow(rank, config):
    engine, loader = start(config)
    train(engine, loader, 20)
    return engine.clan.finish().run_dir


def test_training_goes_on_when_mlflow_is_down(tmp_path):
    config = clan_config(tmp_path, total_steps=20)
    config["clantune"]["tracking"] |= {"mlflow": True, "tracking_uri": "http://127.0.0.1:1"}
    run_dir = run_ranks(2, in_member_worlds, _without_mlflow, config)[0]
    events = list(read_events(run_dir / "events.jsonl"))
    # On a slow disk rounds that are not written down are complained of as well.
    complaints = [e["message"] for e in events if e["kind"] == "warning" and "MLflow" in e["message"]]
    assert len(complaints) == 1 and "does not record this run" in complaints[0] and "Upload it later" in complaints[0]
    assert [event["step"] for event in events if event["kind"] == "round_end"][-1] == 20
    (end,) = [event for event in events if event["kind"] == "run_end"]
    assert end["status"] == "FINISHED" and os.path.isfile(end["artifacts"]["champion"])


def _default_genes(rank, configs):
    genes = []
    for config in configs:
        engine, _ = start(config)
        genes.append([gene.name for gene in engine.clan.genes])
        engine.clan.finish()
    return genes


def test_weight_decay_is_tuned_by_default_only_where_it_acts(tmp_path):
    """40 steps of the clan's 8 samples see none of 640 twice; 100 do."""
    adamw = ds_config(1)
    without = adamw | {"optimizer": {"type": "AdamW", "params": {"torch_adam": True, "weight_decay": 0.0}}}
    decaying_sgd = adamw | {"optimizer": {"type": "SGD", "params": {"lr": 1e-2, "weight_decay": 0.1}}}
    runs = [(adamw, 40), (adamw, 100), (without, 40), (decaying_sgd, 40)]
    configs = [clan_config(tmp_path, config, total_steps=steps) for config, steps in runs]
    for genes in run_ranks(2, in_member_worlds, _default_genes, configs):
        assert genes == [["lr", "weight_decay"], ["lr"], ["lr"], ["lr"]]
