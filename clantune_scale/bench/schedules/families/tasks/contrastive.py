"""Contrastive learning: which of several points is another view of the same one."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from clantune_scale.bench.batched.model import Knobs, Tensors
from clantune_scale.bench.schedules.families.draw import Draw
from clantune_scale.bench.schedules.families.networks import Perceptron
from clantune_scale.bench.schedules.families.registry import TaskFamily, register
from clantune_scale.bench.schedules.families.task import SampledTask


class Contrastive(SampledTask):
    """Two noisy views of a point through random maps, and views of other points (van den Oord et al. 2018).

    A sample brings its own wrong answers, so that its loss does not depend on how a batch is shared out.
    """

    def __init__(self, draw: Draw) -> None:
        inside, self._others = draw.choice((3, 6)), draw.choice((3, 7))
        features = draw.whole(10, 24)
        generator = torch.Generator().manual_seed(draw.key())
        self._maps = torch.randn(2, inside, features, generator=generator) / math.sqrt(inside)
        self._noise, self._sharpness = draw.uniform(0.1, 0.6), draw.choice((2.0, 5.0, 10.0))
        self._network = Perceptron((features, draw.whole(16, 40), draw.choice((4, 8))), draw.choice(("tanh", "relu")))
        self.collect(draw, batch_sizes=(16, 32))

    def init(self, seed: int) -> Tensors:
        return self._network.init(seed)

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        models, samples, views = batch[0].shape[:3]
        places = self._network(parameters, batch[0].flatten(1, 2)).view(models, samples, views, -1)
        places = functional.normalize(places, dim=-1, eps=1e-6)
        likeness = self._sharpness * (places[:, :, :1] * places[:, :, 1:]).sum(dim=-1)
        return -functional.log_softmax(likeness, dim=-1)[..., 0]

    def samples(self, generator: torch.Generator, count: int, part: str) -> list[torch.Tensor]:
        """One tensor [count, 2 + wrong answers, features]: a view, another of the same point, views of others."""
        inside = torch.randn(count, 1 + self._others, self._maps.shape[1], generator=generator)
        asked = torch.tanh(inside[:, :1] @ self._maps[0])
        answers = torch.tanh(inside @ self._maps[1])
        views = torch.cat([asked, answers], dim=1)
        return [views + self._noise * torch.randn(views.shape, generator=generator)]


register(TaskFamily("contrastive", Contrastive))
