"""``clantune export``: what arrives is what the run kept, or a sentence."""

from __future__ import annotations

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

from tests.backends.small_runs import Net


def test_safetensors_arrive_as_they_were_and_load_into_the_model(call, finished_run, tmp_path):
    said = call("export", finished_run.folder, "--to", tmp_path / "out", "--json")
    assert said.code == 0 and said.data["weights"] == 1208
    target = tmp_path / "out" / "champion.safetensors"
    assert target.read_bytes() == (finished_run.folder / "champion.safetensors").read_bytes()
    Net().load_state_dict(load_file(target))


def test_a_state_dict_for_pytorch_holds_the_same(call, finished_run, tmp_path):
    said = call("export", finished_run.folder, "--to", tmp_path, "--format", "pytorch")
    assert said.code == 0 and "all finite" in said.out
    loaded = torch.load(tmp_path / "champion.pt", weights_only=True)
    kept = load_file(finished_run.folder / "champion.safetensors")
    assert loaded.keys() == kept.keys() and all(torch.equal(loaded[name], kept[name]) for name in kept)


def test_a_run_that_goes_on_has_no_weights_yet(call, finished_run, tmp_path):
    said = call("export", finished_run.half, "--to", tmp_path)
    assert said.code == 2 and "weights are written at the end" in said.err


def _copy(finished_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished_run.folder, folder)
    return folder


def _in_two_files(path, target):
    """The same weights as two files with an index, the form of a large model."""
    tensors = list(load_file(path).items())
    parts = {f"champion-0000{i + 1}-of-00002.safetensors": dict(tensors[i::2]) for i in range(2)}
    target.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        save_file(part, target / name, metadata={"format": "pt", "averaged": "true"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (target / "champion.safetensors.index.json").write_text(json.dumps(index))


def test_a_model_in_several_files_arrives_with_its_index(call, finished_run, tmp_path):
    folder = _copy(finished_run, tmp_path)
    _in_two_files(finished_run.folder / "champion.safetensors", folder)
    (folder / "champion.safetensors").unlink()
    said = call("export", folder, "--to", tmp_path / "out", "--json")
    assert said.code == 0 and said.data["weights"] == 1208 and said.data["averaged"]
    assert said.data["file"].endswith("out/champion.safetensors.index.json") and len(said.data["files"]) == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "champion-00001-of-00002.safetensors",
        "champion-00002-of-00002.safetensors",
        "champion.safetensors.index.json",
    ]
    assert call("export", folder, "--to", tmp_path / "one", "--format", "pytorch").code == 0
    loaded = torch.load(tmp_path / "one" / "champion.pt", weights_only=True)
    kept = load_file(finished_run.folder / "champion.safetensors")
    assert loaded.keys() == kept.keys() and all(torch.equal(loaded[name], kept[name]) for name in kept)


def test_of_a_run_that_goes_on_the_last_that_was_saved_is_taken(call, finished_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished_run.half, folder)
    (folder / "champion-step-00000003").mkdir()
    _in_two_files(finished_run.folder / "champion.safetensors", folder / "champion-step-00000007")
    said = call("export", folder, "--to", tmp_path / "out")
    assert said.code == 0 and "and 2 files beside it: 6 tensors" in said.out
    (folder / "champion-step-00000007" / "champion-00001-of-00002.safetensors").unlink()
    said = call("export", folder, "--to", tmp_path / "out")
    assert said.code == 2 and "names champion-00001-of-00002.safetensors, and" in said.err


def test_a_damaged_file_is_said_and_not_exported(call, finished_run, tmp_path):
    folder = _copy(finished_run, tmp_path)
    path = folder / "champion.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    said = call("export", folder, "--to", tmp_path / "out")
    assert said.code == 2 and "is damaged" in said.err and not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_not_exported(call, finished_run, tmp_path):
    folder = _copy(finished_run, tmp_path)
    save_file({"weight": torch.tensor([1.0, float("nan")])}, folder / "champion.safetensors")
    said = call("export", folder, "--to", tmp_path / "out")
    assert said.code == 2 and "weights that are not finite: weight" in said.err


def test_a_file_that_is_gone_is_said_with_where_it_was(call, finished_run, tmp_path):
    folder = _copy(finished_run, tmp_path)
    (folder / "champion.safetensors").unlink()
    said = call("export", folder)
    assert said.code == 2 and "is missing" in said.err and str(finished_run.folder) in said.err


def test_a_run_is_not_exported_onto_itself(call, finished_run):
    said = call("export", finished_run.folder, "--to", finished_run.folder)
    assert said.code == 2 and "the run's own file" in said.err
