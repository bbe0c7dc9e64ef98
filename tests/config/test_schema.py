"""The block: what is accepted, and the sentence for everything that is not."""

from __future__ import annotations

import base64
import json

import pytest

from clantune_scale.config import ClanConfig
from clantune_scale.config.deepspeed_file import extract, load_config, load_ds_config, parse_block
from clantune_scale.errors import ConfigError


def test_population_size_alone_is_a_complete_block():
    config = parse_block({"population_size": 4})
    assert (config.enabled, config.round_length, config.duty_cycle, config.seed) == (True, 20, 0.1, 0)
    assert config.strategy.name == "clan" and list(config.genes) == ["lr"]
    assert config.fitness.num_samples == 256 and config.tracking.mlflow and config.checkpoint.champion


def test_short_forms_equal_long_ones():
    short = parse_block({"population_size": 2, "strategy": "classic", "genes": ["lr", "dropout"]})
    long = parse_block({"population_size": 2, "strategy": {"name": "classic"}, "genes": {"lr": {}, "dropout": {}}})
    assert short == long


def test_models_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        parse_block({"population_size": 2}).population_size = 3


def test_every_field_is_documented():
    def undocumented(model):
        for name, field in model.model_fields.items():
            if not field.description:
                yield f"{model.__name__}.{name}"
            if hasattr(field.annotation, "model_fields"):
                yield from undocumented(field.annotation)

    assert not list(undocumented(ClanConfig))


@pytest.mark.parametrize(
    ("block", "parts"),
    [
        ({}, ["clantune.population_size is missing", '"population_size": 4']),
        ({"population": 4}, ["clantune.population is not a key", "Did you mean 'population_size'?"]),
        (
            {"population_size": 0},
            ["clantune.population_size is 0", "greater than or equal to 1", "Members of the clan"],
        ),
        ({"population_size": "4"}, ["clantune.population_size is '4'", "valid integer"]),
        ({"population_size": True}, ["clantune.population_size is True", "valid integer"]),
        ({"population_size": 4, "round_lenght": 5}, ["clantune.round_lenght", "Did you mean 'round_length'?"]),
        ({"population_size": 4, "num_samples": 5}, ["clantune.num_samples", "It belongs in 'fitness'"]),
        ({"population_size": 4, "zzz": 5}, ["clantune.zzz", "Known there: enabled, population_size"]),
        ({"population_size": 4, "duty_cycle": 1.0}, ["clantune.duty_cycle is 1.0", "less than 1"]),
        ({"population_size": 4, "duty_cycle": float("nan")}, ["clantune.duty_cycle is nan", "finite"]),
        ({"population_size": 4, "seed": -1}, ["clantune.seed is -1", "greater than or equal to 0"]),
        ({"population_size": 4, "enabled": "yes"}, ["clantune.enabled is 'yes'", "valid boolean"]),
        ({"population_size": 4, "strategy": 3}, ["clantune.strategy is 3", "valid dictionary"]),
        ({"population_size": 4, "strategy": {"nam": "clan"}}, ["clantune.strategy.nam", "Did you mean 'name'?"]),
        ({"population_size": 4, "genes": ["lr", "lr"]}, ["clantune.genes is ['lr', 'lr']", "listed twice"]),
        ({"population_size": 4, "genes": "lr"}, ["clantune.genes is 'lr'", "valid dictionary"]),
        ({"population_size": 4, "genes": {"lr": {"bound": [1, 2]}}}, ["clantune.genes.lr.bound", "mean 'bounds'?"]),
        (
            {"population_size": 4, "genes": {"lr": {"bounds": [2, 1]}}},
            ["genes.lr.bounds is [2, 1]", "below the second"],
        ),
        ({"population_size": 4, "genes": {"lr": {"scale": "exp"}}}, ["genes.lr.scale is 'exp'", "'log', 'linear'"]),
        ({"population_size": 4, "genes": {"lr": {"step_size": 0}}}, ["genes.lr.step_size is 0", "greater than 0"]),
        (
            {"population_size": 4, "fitness": {"samples": 5}},
            ["clantune.fitness.samples", "Did you mean 'num_samples'?"],
        ),
        (
            {"population_size": 4, "tracking": {"run_name": "a" * 300}},
            ["tracking.run_name is 'aaa", "at most 200 char"],
        ),
        ({"population_size": 4, "tracking": {"experiment": ""}}, ["tracking.experiment is ''", "at least 1 character"]),
        ({"population_size": 4, "genes": {"lr\n": {}}}, ["clantune.genes is", "'lr\\n' is none"]),
        ({"population_size": 4, "tracking": {"run_name": "a/b"}}, ["tracking.run_name is 'a/b'", "match pattern"]),
        (
            {"population_size": 4, "join": {"port": 70000}},
            ["clantune.join.port is 70000", "less than or equal to 65535"],
        ),
        ({"population_size": "auto"}, ["clantune.population_size", '"auto"', "drop the key"]),
        ({"population_size": 4, "genes": {"lr": {"initial": "auto"}}}, ["clantune.genes.lr.initial", '"auto"']),
        (4, ['"clantune" is 4, not an object', '{"population_size": 4}']),
    ],
)
def test_malformed_block(block, parts):
    with pytest.raises(ConfigError) as error:
        parse_block(block)
    for part in parts:
        assert part in str(error.value)


def test_all_problems_at_once():
    with pytest.raises(ConfigError) as error:
        parse_block({"round_length": 0, "fitnes": {}, "genes": {"lr": {"scal": "log"}}})
    message = str(error.value)
    assert "4 problems" in message
    for path in ("population_size", "round_length", "fitnes", "genes.lr.scal"):
        assert f"clantune.{path} is" in message


@pytest.mark.parametrize(
    "name", ["clan_tune", "clantrain", "ClanTune", "clan-tune", "clan_training", "CLANTUNE", "cantune", "clan"]
)
def test_misspelt_block_name_is_refused(name):
    with pytest.raises(ConfigError, match=f"'{name}'.*Rename it to 'clantune'"):
        extract({"train_batch_size": 8, name: {"population_size": 4}})


def test_deepspeed_names_are_not_near_misses():
    own = {"autotuning": {}, "compile": {}, "tensorboard": {}, "flops_profiler": {}, "gradient_clipping": 1.0}
    assert extract(own) == (own, None)


def test_extract_takes_the_block_out_and_leaves_the_argument():
    ds_config = {"train_batch_size": 8, "clantune": {"population_size": 4, "enabled": False}}
    rest, config = extract(ds_config)
    assert rest == {"train_batch_size": 8} and config.population_size == 4 and not config.enabled
    assert "clantune" in ds_config


def test_every_form_that_deepspeed_takes(tmp_path):
    ds_config = {"train_batch_size": 8, "clantune": {"population_size": 4}}
    json_file, hjson_file = tmp_path / "ds.json", tmp_path / "ds.hjson"
    json_file.write_text(json.dumps(ds_config))
    hjson_file.write_text("{\n  # the clan's\n  train_batch_size: 8\n  clantune: {population_size: 4}\n}")
    encoded = base64.urlsafe_b64encode(json.dumps(ds_config).encode()).decode()
    for form in (ds_config, json_file, str(json_file), str(hjson_file), encoded):
        assert load_ds_config(form) == ds_config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1, "a": 2}', r"repeats the keys \['a'\].*Keep one"),
        ("[1, 2]", "holds a list, not an object"),
        ('{"a": ', "does not parse"),
    ],
)
def test_malformed_file(tmp_path, content, message):
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_ds_config(path)


@pytest.mark.parametrize("config", ["no/such/ds.json", "bm90IGpzb24", 3.5])
def test_what_is_no_config_at_all(config):
    with pytest.raises(ConfigError, match="neither an existing file|does not parse|of type float"):
        load_ds_config(config)


def test_load_config_finds_the_block_in_whatever_the_front_doors_take(tmp_path):
    block = ClanConfig(population_size=3)
    (tmp_path / "config.json").write_text('{"train_batch_size": 6, "clantune": {"population_size": 3}}')
    assert load_config(tmp_path / "config.json") == ({"train_batch_size": 6}, block)
    assert load_config({"population_size": 3}) == load_config(block) == ({}, block)
    assert load_config({"train_batch_size": 6}) == ({"train_batch_size": 6}, None)


def test_more_members_are_not_left_than_there_are():
    with pytest.raises(ConfigError, match="clantune.faults is.*min_members should be at most population_size, 2"):
        parse_block({"population_size": 2, "faults": {"min_members": 3}})


def test_survivors_need_rounds_on_disk():
    with pytest.raises(ConfigError, match="min_members needs rounds on disk.*checkpoint.every_rounds"):
        parse_block({"population_size": 2, "faults": {"min_members": 1}, "checkpoint": {"every_rounds": None}})


def test_a_clan_may_go_on_with_fewer_members():
    block = parse_block({"population_size": 2, "faults": {"min_members": 2}})
    assert (block.faults.deadline_s, block.faults.rejoin_s) == (300, 60)
    assert parse_block({"population_size": 2}).faults.min_members is None
