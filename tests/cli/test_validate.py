"""``clantune validate`` on the configs of this repository and on wrong ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GPT = (
    "--model",
    ROOT / "launch/gpt.py:GPT",
    "--model-args",
    '{"context": 8, "width": 8, "num_layers": 1, "num_heads": 2}',
)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_the_repositorys_own_configs_are_valid(path, call):
    said = call("validate", path, "--world-size", 8)
    assert said.code == 0 and said.out.splitlines()[-1].startswith("0 errors")


def test_it_shows_the_groups_and_binds_genes_to_a_model(call):
    said = call("validate", ROOT / "configs/specialized.json", "--world-size", 8, *GPT)
    assert said.code == 0
    for part in (
        "4 members x (dp 2",
        "member 1: ranks 2, 3",
        "replica group 0 of 2: ranks 0, 2, 4, 6",
        "over 8 ranks",
        "dropout:",
    ):
        assert part in said.out
    assert "give --model" not in said.out
    unbound = call("validate", ROOT / "configs/specialized.json", "--world-size", 8)
    assert "unknown whether the genes bind to the model: give --model" in unbound.out


def _on_the_line(tmp_path, **block):
    config = json.loads((ROOT / "configs/quickstart.json").read_text())
    config["clantune"] |= {"members": "line", **block}
    path = tmp_path / "line.json"
    path.write_text(json.dumps(config))
    return path


def test_on_the_line_it_shows_one_model_on_all_ranks(call, tmp_path):
    said = call("validate", _on_the_line(tmp_path), "--world-size", 8, *GPT)
    assert said.code == 0
    for part in (
        "4 members on the line of one model: dp 8 x pp 1 x tp 1 = 8 ranks",
        "all ranks train one model; gradients are averaged over 8 ranks, as without a clan",
        "batch 32 (micro-batch 4 x accumulation 1 x dp 8)",
        "warning: this strategy lets members compete",
        "0 errors, 1 warning",
    ):
        assert part in said.out
    assert "replica group" not in said.out and "member 1" not in said.out
    data = call("validate", _on_the_line(tmp_path), "--world-size", 8, "--json").data
    assert (data["valid"], data["form"], data["errors"]) == (True, "line", [])
    assert data["members"] == [list(range(8))] * 4
    assert data["topology"] == {"population_size": 1, "dp": 8, "pp": 1, "tp": 1, "world_size": 8}
    assert (data["batch"]["clan_batch"], data["batch"]["member_batch"], data["batch"]["dp_size"]) == (32, 32, 8)


def test_on_the_line_any_number_of_ranks_will_do(call, tmp_path):
    assert call("validate", _on_the_line(tmp_path), "--world-size", 2).code == 0
    assert call("validate", ROOT / "configs/quickstart.json", "--world-size", 2).code == 1


def test_what_the_line_cannot_do_are_errors(call, tmp_path):
    path = _on_the_line(tmp_path, strategy="pbt", genes=["lr", "beta1"], faults={"min_members": 2})
    said = call("validate", path, "--world-size", 8)
    assert said.code == 1
    errors = [line for line in said.out.splitlines() if line.startswith("error: ")]
    for part in ("the strategy 'pbt' lets members", "faults.min_members is 2", "gene 'beta1': members on the line"):
        assert errors.pop(0).startswith(f"error: {part}")
    assert errors == []


def test_errors_are_all_shown_and_the_exit_code_is_1(call, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(
        json.dumps({"train_batch_size": 30, "amp": {}, "clantune": {"population_size": 4, "rond_length": 3}})
    )
    said = call("validate", path, "--world-size", 6)
    assert said.code == 1
    assert [line.split()[0] for line in said.out.splitlines()].count("error:") == 3
    data = call("validate", path, "--world-size", 6, "--json").data
    assert data["valid"] is False and len(data["errors"]) == 3 and data["topology"] is None


def test_a_model_that_is_not_there_is_one_error_more(call):
    said = call("validate", ROOT / "configs/quickstart.json", "--world-size", 6, "--model", "nothing:there", "--json")
    assert said.code == 1 and len(said.data["errors"]) == 2


def test_warnings_count_where_that_is_wanted(call, tmp_path):
    path = tmp_path / "open.json"
    path.write_text(json.dumps({"train_batch_size": 32, "clantune": {"population_size": 4}}))
    assert call("validate", path, "--world-size", 4).code == 0
    assert call("validate", path, "--world-size", 4, "--strict").code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere.json", "--world-size", 4), "neither an existing file nor base64"),
        ((ROOT / "configs/quickstart.json", "--world-size", 0), "--world-size is 0"),
        ((ROOT / "configs/quickstart.json", "--world-size", 4, "--model-args", "{"), "is not JSON"),
    ],
)
def test_what_cannot_be_checked_is_an_error_of_its_own(arguments, message, call):
    said = call("validate", *arguments)
    assert said.code == 2 and message in said.err
