"""A regression small enough to train twice: as rows of a batch, and as the reference's module."""

from __future__ import annotations

from collections.abc import Sequence

import torch

FEATURES, WIDTH = 5, 8
BATCH = 24
NUM_EVAL_BATCHES = 3


class Regression:
    """A one-hidden-layer network with dropout whose masks come with the samples."""

    batch_size = BATCH

    def __init__(self, group_of: Sequence[str] = ()) -> None:
        self.group_of = group_of
        self.validation = self._samples(9, 6 * NUM_EVAL_BATCHES)[:2]

    def init(self, seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = [(FEATURES, WIDTH), (WIDTH,), (WIDTH, 1), (1,)]
        return [0.5 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]

    def batch(self, seed: int, step: int, part: int) -> list[torch.Tensor]:
        return self._samples(10_000 * seed + 10 * step + part + 100, BATCH)

    def losses(self, parameters, batch, knobs) -> torch.Tensor:
        hidden = torch.tanh(torch.baddbmm(parameters[1].unsqueeze(1), batch[0], parameters[0]))
        if "dropout" in knobs and len(batch) == 3:
            rate = knobs["dropout"].view(-1, 1, 1)
            hidden = hidden * (batch[2] >= rate) / (1 - rate)
        output = torch.baddbmm(parameters[3].unsqueeze(1), hidden, parameters[2])
        return (output - batch[1]).square().mean(dim=-1)

    def _samples(self, key: int, count: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(key)
        inputs = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64)
        masks = torch.rand(count, WIDTH, generator=generator, dtype=torch.float64)
        return [inputs, torch.sin(inputs.sum(dim=1, keepdim=True)), masks]


class AsModule(torch.nn.Module):
    """The same network for ``ReferenceClan``: its forward pass is a batch of one model."""

    def __init__(self, model: Regression, seed: int) -> None:
        super().__init__()
        self.model, self.rate = model, 0.0
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(p) for p in model.init(seed)])

    def forward(self, batch: Sequence[torch.Tensor]) -> torch.Tensor:
        knobs = {"dropout": torch.tensor([self.rate], dtype=torch.float64)}
        return self.model.losses([p.unsqueeze(0) for p in self.weights], [x.unsqueeze(0) for x in batch], knobs).mean()
