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


@pytest.fixture
def line_config(tmp_path):
    """The quickstart's config with its members on the line."""
    config = json.loads(QUICKSTART.read_text())
    config["clantune"]["members"] = "line"
    path = tmp_path / "line.json"
    path.write_text(json.dumps(config))
    return path


def test_the_four_forms_stand_side_by_side(call, line_config):
    arguments = ("--params", "1e9", "--world-size", 8, "--hardware", "h100", "--tokens-per-sample", 1024)
    data = call("plan", line_config, *arguments, "--json").data
    assert data["form"] == "line" and list(data["forms"]) == ["groups", "line", "plain", "hsdp"]
    groups, line, plain, hsdp = data["forms"].values()
    assert data["memory"]["clan"] == line["memory"] and data["memory"]["plain"] == plain["memory"]
    # ZeRO 1 in fp32: 1e9 weights over 8 ranks, or over the 2 of a member; an average, and two arrays of a round.
    assert line["memory"]["device"] - plain["memory"]["device"] == 3 * 4e9 / 8
    assert groups["memory"]["device"] - hsdp["memory"]["device"] == 4e9 / 2
    assert hsdp["memory"]["device"] - plain["memory"]["device"] == 12e9 / 2 - 12e9 / 8
    assert line["memory"]["round_end"] == line["memory"]["device"] - 4e9 + 4e9 / 8
    assert line["memory"]["round_end_in_loop"] == line["memory"]["device"] + 4e9 / 8
    assert line["memory"]["host"] == 3 * 16e9 / 8
    assert line["seconds"] == pytest.approx(sum(data["cost"]["seconds"].values()))
    assert plain["seconds"] == pytest.approx(data["cost"]["plain_seconds"])
    assert all(form["fits"] and form["obstacle"] is None for form in data["forms"].values())
    said = call("plan", line_config, *arguments).out
    in_loop = amount(line["memory"]["round_end_in_loop"])
    assert f"A loop of your own (DDP, FSDP2) holds its gradients at a round's end: {in_loop} on" in said
    other = call("plan", QUICKSTART, *arguments, "--json").data
    assert other["form"] == "groups" and other["forms"] == data["forms"]


def test_the_page_names_the_chosen_form(call, line_config):
    arguments = ("--params", "1e9", "--world-size", 8, "--hardware", "h100", "--tokens-per-sample", 1024)
    lines = call("plan", line_config, *arguments).out.splitlines()
    assert lines[:2] == [
        "4 members on the line of one model: dp 8 x pp 1 x tp 1 = 8 ranks",
        "batch 32 (micro-batch 4 x accumulation 1 x dp 8)",
    ]
    rows = {line[:22].strip(): line[22:].split() for line in lines if line[22:].strip()}
    assert rows["memory of a rank"] == ["groups", "[line]", "plain", "HSDP"]
    assert rows["arrays of the line"] == ["0", "B", "1", "GB", "0", "B", "0", "B"]
    assert rows["fits a device"] == ["yes"] * 4 and len(rows["seconds of the run"]) == 4
    assert "  State is sharded over all ranks, as without a clan: 1.5 GB more on each device (16 %)." in lines
    page = "\n".join(lines)
    assert "bytes of all ranks" in page and "out of it" not in page and "  clone" not in page
    assert "samples repeated or rolled back: 0 of 48,000" in page
    assert "[groups]      line" in call("plan", QUICKSTART, *arguments).out


def test_a_state_that_is_not_sharded_is_said_to_be_whole(call):
    said = call("plan", ROOT / "configs/line.json", "--params", "1e6", "--world-size", 4)
    # Without ZeRO in fp32: weights, gradients, two moments; an average and two arrays of a round.
    assert "  State is whole on each device, as without a clan: 12 MB more on each device (75 %)." in said.out


def test_bytes_on_the_line_stay_inside_the_one_model(call, line_config):
    data = call("plan", line_config, "--params", "1e6", "--world-size", 8, "--steps", 400, "--json").data
    traffic = data["traffic"]
    assert traffic["plain_step"] == traffic["cooperative_step"] == traffic["last_cooperative_step"]
    assert traffic["clone"] == {"collectives": [], "inside_bytes": 0, "crossing_bytes": 0}
    assert all(part["crossing_bytes"] == 0 for part in traffic.values())
    assert traffic["mean_round"]["inside_bytes"] > 20 * traffic["plain_step"]["inside_bytes"]


def test_a_form_that_these_ranks_do_not_allow_says_why(call, line_config):
    said = call("plan", line_config, "--params", "1e6", "--world-size", 2, "--hardware", "h100")
    assert said.code == 0
    assert "  no groups: population_size(4) x pp(1) x tp(1) = 4 does not divide the 2 ranks that the" in said.out
    assert "  no HSDP: 2 ranks do not divide among 4 replicas" in said.out
    forms = call("plan", line_config, "--params", "1e6", "--world-size", 2, "--json").data["forms"]
    assert [form["memory"] is None for form in forms.values()] == [True, False, False, True]
    pbt = call("plan", ROOT / "configs/pbt.json", "--params", "1e6", "--world-size", 4).out
    assert "  no line: the strategy 'pbt' lets members hold states of their own" in pbt


def test_a_line_that_does_not_fit_may_store_its_arrays_on_the_host(call, line_config):
    arguments = ("--params", "1.3e10", "--world-size", 8, "--hardware", '{"like": "h100", "memory_bytes": 140e9}')
    said = call("plan", line_config, *arguments)
    assert 'a device has 140 GB. Use "line": {"store": "host"}, a higher ZeRO stage or more ranks' in said.out
    config = json.loads(line_config.read_text())
    config["clantune"]["line"] = {"store": "host"}
    line_config.write_text(json.dumps(config))
    said = call("plan", line_config, *arguments)
    assert said.code == 0 and "does not fit" not in said.out
    said = call("plan", line_config, "--params", "2e10", *arguments[2:])
    assert "a device has 140 GB. Use a higher ZeRO stage or more ranks" in said.out


def test_a_line_config_that_a_run_would_refuse_is_sent_to_validate(call, line_config):
    config = json.loads(line_config.read_text())
    config["clantune"]["genes"] = ["lr", "beta1"]
    line_config.write_text(json.dumps(config))
    said = call("plan", line_config, "--params", "1e6", "--world-size", 4)
    assert said.code == 2 and "gene 'beta1': members on the line are computed from one model" in said.err


def test_members_on_the_line_that_fit_a_budget_may_outnumber_the_ranks(call, line_config, finished_run):
    base = ("plan", line_config, "--params", "1e6", "--world-size", 2, "--measured", finished_run.folder)
    fits = call(*base, "--budget-percent", 1e6, "--json").data["budget"]["fits"]
    assert [row["population_size"] for row in fits] == [4, 3, 2]


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
