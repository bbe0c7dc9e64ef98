"""The clan's batch divided: every combination of DeepSpeed's three keys, and what does not divide."""

from __future__ import annotations

import itertools
import re

import pytest

from clantune_scale.config.batch import clipping_of, split_batch, with_arguments
from clantune_scale.errors import ConfigError

FULL = {"train_batch_size": 96, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}


@pytest.mark.parametrize("dropped", [(), *((key,) for key in FULL)])
def test_two_of_three_keys_are_enough(dropped):
    config = {key: value for key, value in FULL.items() if key not in dropped}
    member, plan = split_batch(config, population_size=4, dp_size=2)
    assert (plan.clan_batch, plan.member_batch, plan.micro_batch, plan.accumulation) == (96, 24, 4, 3)
    assert member == {**FULL, "train_batch_size": 24}


def test_one_key_is_enough():
    _, plan = split_batch({"train_batch_size": 64}, population_size=4, dp_size=2)
    assert (plan.clan_batch, plan.micro_batch, plan.accumulation) == (64, 8, 1)
    _, plan = split_batch({"train_micro_batch_size_per_gpu": 8}, population_size=4, dp_size=2)
    assert (plan.clan_batch, plan.micro_batch, plan.accumulation) == (64, 8, 1)


def test_other_keys_and_the_argument_are_left_alone():
    config = {"train_batch_size": 8, "bf16": {"enabled": True}}
    member, _ = split_batch(config, population_size=2, dp_size=1)
    assert member["bf16"] == {"enabled": True} and config["train_batch_size"] == 8


def test_a_member_equals_what_deepspeed_derives_for_its_ranks():
    # DeepSpeed's own equation, for the member's world.
    for population_size, dp_size in itertools.product((1, 2, 4), (1, 2, 3)):
        member, plan = split_batch({**FULL, "train_batch_size": None}, population_size=population_size, dp_size=dp_size)
        assert member["train_batch_size"] == 4 * 3 * dp_size
        assert plan.clan_batch == population_size * member["train_batch_size"]


def test_describe_is_one_line_with_the_numbers():
    _, plan = split_batch(FULL, population_size=4, dp_size=2)
    assert plan.describe() == "batch 96 = 4 members x 24 (micro-batch 4 x accumulation 3 x dp 2)"


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"gradient_accumulation_steps": 2}, ["neither train_batch_size nor train_micro_batch_size_per_gpu"]),
        (
            {"train_batch_size": 30},
            ["(gradient_accumulation_steps(1) x population_size(4) x dp(2)) = 30 / 8 leaves a rest of 6", "24 or 32"],
        ),
        (
            {"train_batch_size": 30, "train_micro_batch_size_per_gpu": 8},
            ["30 / (train_micro_batch_size_per_gpu(8) x population_size(4) x dp(2)) = 30 / 64", "to 64"],
        ),
        ({**FULL, "train_batch_size": 24}, ["(4) x gradient_accumulation_steps(3) x population_size(4) x dp(2) = 96"]),
        ({"train_batch_size": "auto"}, ['train_batch_size is "auto"', "Write a number"]),
        ({**FULL, "gradient_accumulation_steps": "auto"}, ['gradient_accumulation_steps is "auto"']),
        ({"train_batch_size": 0}, ["train_batch_size is 0", "at least 1"]),
        ({"train_batch_size": 8.0}, ["train_batch_size is 8.0"]),
    ],
)
def test_batch_that_cannot_be_divided(config, parts):
    with pytest.raises(ConfigError) as error:
        split_batch(config, population_size=4, dp_size=2)
    for part in parts:
        assert part in str(error.value)


def test_autotp_counts_tensor_ranks_too():
    """DeepSpeed's own arithmetic on 8 ranks, tp 2: train_batch_size = micro x accumulation x 8, half of them read."""
    config = {"train_batch_size": 64, "gradient_accumulation_steps": 2}
    member, plan = split_batch(config, population_size=2, dp_size=2, counted=2)
    assert (plan.clan_batch, plan.member_batch, plan.micro_batch, plan.accumulation) == (32, 16, 4, 2)
    assert member == {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    assert "each tensor rank for itself, train_batch_size is 64" in plan.describe()
    with pytest.raises(ConfigError, match=r"population_size\(2\) x dp\(2\) x tp\(2\)"):
        split_batch(config | {"train_batch_size": 60}, population_size=2, dp_size=2, counted=2)


def _given(micro: int | None = None, accumulation: int | None = None, clip: float | None = None) -> dict:
    return {
        "train_micro_batch_size_per_gpu": ("micro_batch_size", micro),
        "gradient_accumulation_steps": ("accumulation", accumulation),
        "gradient_clipping": ("gradient_clipping", clip),
    }


def test_keywords_complete_a_config():
    merged = with_arguments({"train_batch_size": 96}, function="attach", given=_given(micro=4, clip=1.0))
    _, plan = split_batch(merged, population_size=4, dp_size=2)
    assert (plan.micro_batch, plan.accumulation, clipping_of(merged)) == (4, 3, 1.0)
    # "auto" is what other libraries fill in; a keyword does it here.
    auto = {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
    assert with_arguments(auto, function="attach", given=_given(2, None, 0.5)) == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.5,
    }
    # One that says the same is no contradiction.
    assert with_arguments(FULL, function="attach", given=_given(4, 3)) == FULL


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (_given(micro=8), "given micro_batch_size=8, and the config says train_micro_batch_size_per_gpu: 4. Leave one"),
        (_given(accumulation=1), "given accumulation=1, and the config says gradient_accumulation_steps: 3."),
        (_given(clip=0.0), "given gradient_clipping=0.0, and the config says gradient_clipping: 1.0."),
    ],
)
def test_a_keyword_that_contradicts_the_config_is_refused_with_both(given, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        with_arguments({**FULL, "gradient_clipping": 1.0}, function="attach", given=given)


def test_a_size_has_to_be_somewhere():
    with pytest.raises(ConfigError, match="attach_megatron\\(\\) got no micro_batch_size, and the config has neither"):
        with_arguments({}, function="attach_megatron", given=_given(accumulation=2))


@pytest.mark.parametrize("value", [-1.0, True, "auto", float("nan")])
def test_a_threshold_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match="Set it to a number of at least 0"):
        clipping_of({"gradient_clipping": value})
    assert clipping_of({}) is None and clipping_of({"gradient_clipping": 0}) == 0.0
