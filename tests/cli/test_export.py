"""``clantune export``: what arrives is what the run kept, or a sentence."""

from __future__ import annotations

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
    assert said.code == 2 and "is gone" in said.err and str(finished_run.folder) in said.err


def test_a_run_is_not_exported_onto_itself(call, finished_run):
    said = call("export", finished_run.folder, "--to", finished_run.folder)
    assert said.code == 2 and "the run's own file" in said.err
