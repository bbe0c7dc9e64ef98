"""Weights whose memory is in another order than their axes: a round on disk, and a resume on other ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import clantune_scale
from clantune_scale.checkpoint import reshard
from clantune_scale.transfer.memory import memory_of
from clantune_scale.transfer.state import Piece


class Convolution(nn.Module):
    """Channels last; returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)).to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (self.body(images) - 1).square().mean()


def _run(directory: Any, num_steps: int, **checkpoint: Any) -> tuple[int, list[torch.Tensor], list[Any], str]:
    config = {
        "members": "line",
        "population_size": 2,
        "round_length": 2,
        "strategy": {"name": "clan", "options": {"growth": 0.0}},
        "total_steps": 100,
        "fitness": {"num_samples": 8},
        "tracking": {"directory": str(directory), "mlflow": False},
        "checkpoint": {"every_rounds": 1, "asynchronous": False} | checkpoint,
    }
    images = list(torch.randn(16, 3, 5, 5, generator=torch.Generator().manual_seed(0)))
    model = Convolution()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    clan = clantune_scale.attach(model, optimizer, config=config, eval_data=images, micro_batch_size=4)
    begun = clan.num_steps
    for step in clan.steps(clan.loader(images), until=num_steps):
        for batch in step:
            model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    clan.rounds.release()
    clan.detach()
    weights, strides = [p.detach().clone() for p in model.parameters()], [p.stride() for p in model.parameters()]
    return begun, weights, strides, str(clan.recorder.run_dir)


def test_a_resumed_run_has_the_same_weights_in_the_same_order(tmp_path):
    _, weights, strides, _ = _run(tmp_path / "whole", 9)
    assert strides[0] == (27, 1, 9, 3)
    *_, stopped = _run(tmp_path / "parts", 5)
    begun, resumed, again, _ = _run(tmp_path / "parts", 9, resume=stopped)
    assert begun == 4 and again == strides
    assert all(torch.equal(a, b) for a, b in zip(weights, resumed, strict=True))


def test_a_part_of_a_tensor_goes_where_it_belongs_whatever_the_order_in_memory():
    saved = torch.arange(12.0).view(3, 4)
    live = torch.zeros(4, 3).t()
    # The saved tensor is the first half of a vector of 24, and the live one begins at its seventh element.
    moved = reshard._copy(saved, Piece("w", 0, 0, 12), live, Piece("w", 6, 0, 12))
    expected = torch.tensor([6.0, 7, 8, 9, 10, 11, 0, 0, 0, 0, 0, 0]).view(3, 4)
    assert moved == 6 and torch.equal(live, expected)


def test_every_element_of_memory_is_seen_once():
    base = torch.arange(24.0)
    kinds = {
        "plain": base.view(4, 6),
        "transposed": base.view(4, 6).t(),
        "channels last": base.view(2, 2, 3, 2).permute(0, 3, 1, 2),
        "slice": base.view(4, 6)[:, 1:3],
        "slice of a transposed one": base.view(2, 3, 4).transpose(0, 2)[1:3, :, 1:],
        "expanded": base[:6].view(6, 1).expand(6, 4),
        "scalar": base[3],
        "empty": base[:0],
    }
    for name, tensor in kinds.items():
        parts = list(memory_of(tensor))
        assert all(part.is_contiguous() and part.dim() == 1 for part in parts), name
        assert sorted(torch.cat([*parts, base[:0]]).tolist()) == sorted(set(tensor.flatten().tolist())), name
