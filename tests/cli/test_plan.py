"""``clantune plan``: its page, its data, its refusals; the numbers are tested in ``tests/planning``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clantune_scale.cli.plan_text import amount

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs/quickstart.json"
GPT = (
    "--model",
    ROOT / "launch/gpt.py:GPT",
    "--model-args",
    '{"context": 8, "width": 8, "num_layers": 1, "num_heads": 2}',
)


def test_the_price_is_said(call):
    said = call("plan", QUICKSTART, "--params", "1e9", "--world-size", 8, "--hardware", "h100")
    assert said.code == 0
    assert "State is sharded over a member's ranks" in said.out
    data = call("plan", QUICKSTART, "--params", "1e9", "--world-size", 8, "--hardware", "h100", "--json").data
    # ZeRO 1 in fp32: masters and two moments of 1e9 weights over 2 ranks against 8, and an average.
    assert data["memory"]["clan"]["device"] - data["memory"]["plain"]["device"] == 12e9 / 2 - 12e9 / 8 + 4e9 / 2
    assert data["memory"]["clan"]["host"] == 16e9 / 2


def test_a_model_and_its_size_are_the_same_plan(call):
    by_model = call("plan", QUICKSTART, *GPT, "--world-size", 4, "--json").data
    by_size = call("plan", QUICKSTART, "--params", by_model["parameters"], "--world-size", 4, "--json").data
    assert by_model["memory"] == by_size["memory"]
    assert by_model["traffic"]["cooperative_step"] == by_size["traffic"]["cooperative_step"]


def test_seconds_need_a_source_and_name_it(call, finished_run):
    bare = call("plan", QUICKSTART, "--params", "1e6", "--world-size", 4)
    assert "no seconds: give --hardware" in bare.out
    nominal = call(
        "plan", QUICKSTART, "--params", "1e6", "--world-size", 4, "--hardware", "a100-80gb", "--tokens-per-sample", 128
    )
    assert "nominal figures, not measured; assumed: 40%" in nominal.out
    measured = call("plan", QUICKSTART, "--params", "1e6", "--world-size", 4, "--measured", finished_run.half)
    assert "rounds of a measured run" in measured.out


def test_samples_that_are_lost_are_counted_in_tokens_too(call):
    said = call("plan", ROOT / "configs/classic.json", "--params", "1e6", "--world-size", 4, "--steps", 100,
                "--tokens-per-sample", 10, "--json")  # fmt: skip
    cost = said.data["cost"]
    assert cost["competitive_steps"] == 16  # two rounds of 50, duty 0.15
    assert cost["samples"] - cost["unique_samples"] == 16 * 32 * 3 // 4
    assert said.data["unique_tokens_lost"] == 16 * 32 * 3 // 4 * 10


def test_a_rounds_bytes_are_its_steps_its_end_and_its_clone(call):
    data = call("plan", QUICKSTART, "--params", "1e6", "--world-size", 8, "--steps", 100, "--json").data
    traffic, cost = data["traffic"], data["cost"]
    rounds = cost["num_rounds"]
    steps = 100 * traffic["cooperative_step"]["inside_bytes"]
    looks = traffic["last_cooperative_step"]["inside_bytes"] - traffic["cooperative_step"]["inside_bytes"]
    ends = traffic["round_end"]["inside_bytes"] + traffic["clone"]["inside_bytes"]
    assert traffic["mean_round"]["inside_bytes"] == pytest.approx(steps / rounds + looks + ends)


def test_a_race_is_a_round_without_a_step_that_all_share(call):
    said = call("plan", QUICKSTART, "--params", "1e6", "--world-size", 8, "--steps", 800, "--json")
    traffic, cost = said.data["traffic"], said.data["cost"]
    rounds, raced = cost["num_rounds"], cost["competitive_steps"]
    assert raced == 21 and cost["trained_samples"] == cost["samples"] * (800 + 3 * raced) / 800
    for way in ("inside_bytes", "crossing_bytes"):
        parts = {name: part[way] for name, part in traffic.items()}
        steps = (800 - raced) * parts["cooperative_step"] + raced * parts["competitive_step"]
        looks = (rounds - 1) * (parts["last_cooperative_step"] - parts["cooperative_step"])
        ends = rounds * (parts["round_end"] + parts["clone"])
        assert parts["mean_round"] == pytest.approx((steps + looks + ends) / rounds)


def test_a_run_whose_length_the_config_does_not_say_races_as_one_of_sixty_rounds(call, tmp_path):
    config = json.loads(QUICKSTART.read_text())
    del config["clantune"]["total_steps"]
    path = tmp_path / "endless.json"
    path.write_text(json.dumps(config))
    arguments = ("--params", "1e6", "--world-size", 4, "--steps", 800)
    assert call("plan", path, *arguments, "--json").data["cost"]["competitive_steps"] == 32
    assert call("plan", QUICKSTART, *arguments, "--json").data["cost"]["competitive_steps"] == 21


def test_what_fits_a_budget(call, finished_run):
    base = ("plan", QUICKSTART, "--params", "1e6", "--world-size", 4, "--measured", finished_run.folder)
    everything = call(*base, "--budget-percent", 1e6, "--json").data["budget"]["fits"]
    assert [row["population_size"] for row in everything] == [4, 2]
    nothing = call(*base, "--budget-percent", -50)
    assert nothing.code == 0 and "nothing fits -50 %" in nothing.out


def test_a_device_that_is_too_small_is_said(call):
    said = call("plan", QUICKSTART, "--params", "2e10", "--world-size", 4, "--hardware", "h100")
    assert "It does not fit: a device has 80 GB" in said.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Give either --model MODULE:FACTORY or --params N"),
        (("--params", "many"), "'many' is not a number"),
        (("--params", "1.5"), "not a whole number"),
        (("--params", "1e6", "--hardware", "h10"), "Did you mean 'h100'"),
        (("--params", "1e6", "--measured", "nowhere"), "'nowhere' is no run"),
        (("--params", "1e6", "--budget-percent", "5"), "needs seconds, and none are known"),
    ],
)
def test_what_cannot_be_planned_is_said(arguments, message, call):
    said = call("plan", QUICKSTART, "--world-size", 4, *arguments)
    assert said.code == 2 and message in said.err and said.out == ""


def test_a_config_with_errors_is_sent_to_validate(call, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"train_batch_size": 30, "clantune": {"population_size": 4}}))
    said = call("plan", path, "--params", "1e6", "--world-size", 4)
    assert (
        said.code == 2 and "leaves a rest of 2" in said.err and "`clantune validate` shows all errors (1)" in said.err
    )


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (80e9, "80 GB"), (2e18, "2e+03 PB")]
)
def test_amounts_have_units(number, text):
    assert amount(number) == text
