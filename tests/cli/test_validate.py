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
