"""What holds the tensors of a batch stays what it is; the order of the leaves is that of the containers."""

from __future__ import annotations

import collections
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

from clantune_scale.data.containers import leaves_of, map_leaves, tensors_in, to_device
from clantune_scale.errors import CheckpointError
from clantune_scale.runtime.line.turns import HeldBatch, form_of


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass(frozen=True)
class Sample:
    x: Any
    name: str = field(init=False, default="n")


ONE, TWO = torch.ones(2), torch.zeros(3)
BATCHES = [
    ONE,
    [ONE, (TWO, 3)],
    Pair(ONE, [TWO]),
    Sample(ONE),
    {"a": Sample(Pair(ONE, "text")), "b": TWO},
    collections.OrderedDict(b=ONE, a=None),
    collections.UserDict({"x": ONE}),
]


def _is_equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, Sample):
        return ours.name == theirs.name and _is_equal(ours.x, theirs.x)
    if isinstance(ours, Mapping):
        return list(ours) == list(theirs) and all(_is_equal(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(_is_equal, ours, theirs))
    return ours == theirs


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: type(batch).__name__)
def test_a_batch_keeps_its_form_on_another_device_and_in_host_memory(batch):
    moved = to_device(batch, torch.device("meta"))
    assert type(moved) is type(batch) and all(tensor.is_meta for tensor in tensors_in(moved))
    assert len(list(tensors_in(moved))) == len(list(tensors_in(batch))) > 0
    held = HeldBatch(batch).get()
    assert type(held) is type(batch) and _is_equal(held, batch)
    assert all(ours is not theirs for ours, theirs in zip(tensors_in(held), tensors_in(batch), strict=True))


def test_leaves_come_in_order_and_a_mapping_that_cannot_be_written_becomes_a_dict():
    assert leaves_of({"b": [1, Pair(2, 3)], "a": Sample(4)}) == [1, 2, 3, 4, "n"]
    assert map_leaves(lambda leaf: leaf + 1, MappingProxyType({"x": 1})) == {"x": 2}
    whole = {"x": [1]}
    assert map_leaves(lambda leaf: leaf, whole)["x"] is not whole["x"]


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: type(batch).__name__)
def test_a_held_batch_comes_back_from_a_checkpoint_in_the_form_of_the_next_one(batch, tmp_path):
    torch.save(HeldBatch(batch).saved(), tmp_path / "held.pt")
    held = HeldBatch.of(torch.load(tmp_path / "held.pt", weights_only=True))
    with pytest.raises(CheckpointError, match="which no batch has had since"):
        held.get()
    held.take_form(({"other": batch},))
    held.take_form(map_leaves(lambda leaf: leaf * 0 if isinstance(leaf, torch.Tensor) else leaf, batch))
    assert _is_equal(held.get(), batch) and type(held.get()) is type(batch)


def test_a_batch_that_holds_more_than_tensors_numbers_and_text_says_so_when_it_comes_back():
    saved = HeldBatch({"x": ONE, "made by": object()}).saved()
    with pytest.raises(CheckpointError, match=r"hold more than tensors, numbers and text: \{'x': None, 'made by'"):
        HeldBatch.of(saved)
    assert form_of(Pair(ONE, 2)) == "Pair(x=None, y=None)"
