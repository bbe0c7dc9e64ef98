"""Training that continues from a trained state, on the same data or on others."""

from __future__ import annotations

import torch

from clantune_scale.bench.batched.model import Knobs, Tensors
from clantune_scale.bench.schedules.families.draw import Draw
from clantune_scale.bench.schedules.families.registry import TaskFamily, register
from clantune_scale.bench.schedules.families.task import Task
from clantune_scale.bench.schedules.families.tasks.language import LanguagePerceptron
from clantune_scale.bench.schedules.families.tasks.regression import Teacher

#: Seed of the data of the training before, which no run has.
BEFORE = 77
_RATE, _BETAS = 3e-3, (0.9, 0.99)


class Continued(Task):
    """``after``, from weights that were trained on ``before`` by Adam with a rate that fell to zero.

    Args:
        before: with parameters of the same shapes.
        after: what the run trains on.
        steps: of the training before.
    """

    def __init__(self, before: Task, after: Task, steps: int) -> None:
        self._before, self._after, self._steps = before, after, steps
        self._trained: dict[int, list[torch.Tensor]] = {}
        self.batch_size, self.num_samples = after.batch_size, after.num_samples
        self.validation, self.test = after.validation, after.test

    def init(self, seed: int) -> Tensors:
        if seed not in self._trained:
            self._trained[seed] = self._train(seed)
        return [parameter.clone() for parameter in self._trained[seed]]

    def batch(self, seed: int, step: int, part: int) -> Tensors:
        return self._after.batch(seed, step, part)

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        return self._after.losses(parameters, batch, knobs)

    @torch.enable_grad()  # initial weights are asked for while nothing else needs gradients
    def _train(self, seed: int) -> list[torch.Tensor]:
        parameters = [parameter.clone().unsqueeze(0).requires_grad_() for parameter in self._before.init(seed)]
        optimizer = torch.optim.Adam(parameters, _RATE, _BETAS)
        for step in range(self._steps):
            optimizer.param_groups[0]["lr"] = _RATE * (1 - step / self._steps)
            batch = [column.unsqueeze(0) for column in self._before.batch(seed + BEFORE, step, 0)]
            loss = self._before.losses(parameters, batch, {}).mean()
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            optimizer.step()
        return [parameter.detach().squeeze(0) for parameter in parameters]


def regression(draw: Draw) -> Task:
    """A teacher, then one that differs from it a little or more."""
    turned, steps = draw.choice((0.0, 0.1, 0.4)), draw.whole(300, 1500)
    return Continued(Teacher(draw.child("data")), Teacher(draw.child("data"), turned=turned), steps)


def language(draw: Draw) -> Task:
    """One text, then another one."""
    steps, network = draw.whole(300, 1500), draw.child("network")
    before, after = draw.choice((("code", "prose"), ("prose", "code"), ("prose", "prose"), ("names", "prose")))
    texts = (LanguagePerceptron(network.child(), text=text) for text in (before, after))
    return Continued(next(texts), next(texts), steps)


register(TaskFamily("continued regression", regression))
register(TaskFamily("continued language", language, steps=(300, 2000)))
