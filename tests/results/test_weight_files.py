"""Weights in one file and in several: split, indexed, found again, and refused where something is wrong."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from clantune_scale.errors import ClanError
from clantune_scale.results import weight_files


class Rendezvous:
    """Gathers between threads, as ranks do."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._said: list = [None] * size

    def gather_as(self, place: int):
        def gather(value):
            self._said[place] = value
            self._barrier.wait(10)
            return list(self._said)

        return gather


def _write(folder, parts, max_bytes=1 << 30, stem="model"):
    """Writes from as many ranks as there are parts."""
    meeting = Rendezvous(len(parts))

    def rank(place):
        return weight_files.write(
            parts[place],
            folder,
            stem,
            gather=meeting.gather_as(place),
            place=place,
            max_bytes=max_bytes,
            metadata={"format": "pt", "averaged": "false"},
        )

    with ThreadPoolExecutor(len(parts)) as pool:
        names = list(pool.map(rank, range(len(parts))))
    assert len(set(names)) == 1
    weight_files.settle(folder, stem, names[0])
    return names[0]


def _tensors(*names, size=10):
    return {name: torch.arange(size, dtype=torch.float32) + len(name) for name in names}


def test_one_writer_with_room_makes_one_file(tmp_path):
    tensors = _tensors("a", "bb")
    assert _write(tmp_path, [None, tensors]) == "model.safetensors"
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    found = weight_files.find(tmp_path, "model")
    read, metadata = weight_files.read(found)
    assert found.main == tmp_path / "model.safetensors" and metadata["averaged"] == "false"
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_several_writers_and_sizes_make_numbered_files_and_the_index(tmp_path):
    first, second = _tensors("a", "bb", "ccc"), _tensors("dddd", "eeeee")
    # Two tensors of 40 bytes fit into 80, so that the first writer needs two files and the second one.
    assert _write(tmp_path, [first, None, second], max_bytes=80) == "model.safetensors.index.json"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    expected = dict(
        zip(["a", "bb", "ccc", "dddd", "eeeee"], [names[0], names[0], names[1], *names[2:] * 2], strict=True)
    )
    assert index == {"metadata": {"total_size": 200}, "weight_map": expected}
    assert sorted(load_file(tmp_path / names[0])) == ["a", "bb"]
    read, _ = weight_files.read(weight_files.find(tmp_path, "model"))
    whole = first | second
    assert read.keys() == whole.keys() and all(torch.equal(read[name], whole[name]) for name in whole)


def test_a_tensor_larger_than_a_file_has_one_of_its_own(tmp_path):
    _write(tmp_path, [_tensors("a") | _tensors("large", size=100) | _tensors("b")], max_bytes=80)
    found = weight_files.find(tmp_path, "model")
    assert [sorted(load_file(path)) for path in found.files] == [["a"], ["large"], ["b"]]


def test_torchs_own_reader_of_hugging_face_folders_reads_it(tmp_path):
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    whole = _tensors("a", "bb") | _tensors("ccc")
    _write(tmp_path, [_tensors("a", "bb"), _tensors("ccc")])
    state = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    with pytest.warns(UserWarning, match="intent is to load in a single process"):
        load(state, storage_reader=HuggingFaceStorageReader(str(tmp_path)))
    assert all(torch.equal(state[name], whole[name]) for name in whole)


@pytest.mark.parametrize("then", [[_tensors("a")], [_tensors("a"), _tensors("bb")]], ids=["one", "two"])
def test_what_an_earlier_model_left_is_not_mistaken_for_the_new_one(tmp_path, then):
    _write(tmp_path, [_tensors("old")] if len(then) > 1 else [_tensors("old"), _tensors("older")])
    _write(tmp_path, then)
    read, _ = weight_files.read(weight_files.find(tmp_path, "model"))
    assert read.keys() == {name for part in then for name in part}


def test_what_is_missing_damaged_or_contradictory_is_said(tmp_path):
    assert weight_files.find(tmp_path, "model") is None
    _write(tmp_path, [_tensors("a"), _tensors("bb")])
    second, index = tmp_path / "model-00002-of-00002.safetensors", tmp_path / "model.safetensors.index.json"
    content = index.read_text()
    index.write_text(content.replace('"bb"', '"cc"'))
    with pytest.raises(ClanError, match="disagree about bb, cc"):
        weight_files.read(weight_files.find(tmp_path, "model"))
    index.write_text(content)
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(ClanError, match=r"model-00002-of-00002.safetensors is damaged"):
        weight_files.read(weight_files.find(tmp_path, "model"))
    second.unlink()
    with pytest.raises(ClanError, match=r"names model-00002-of-00002.safetensors, and .* lacks it"):
        weight_files.find(tmp_path, "model")
    index.write_text(content[:-5])
    with pytest.raises(ClanError, match="is damaged"):
        weight_files.find(tmp_path, "model")


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    _write(tmp_path, [_tensors("a")], stem="secret")
    (inside / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(ClanError, match="lacks it"):
        weight_files.find(inside, "model")
