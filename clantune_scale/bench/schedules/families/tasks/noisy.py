"""Objectives with much noise or without a network: a curved valley, a policy, a density."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from clantune_scale.bench.batched.model import Knobs, Tensors
from clantune_scale.bench.schedules.families.draw import Draw
from clantune_scale.bench.schedules.families.networks import Perceptron
from clantune_scale.bench.schedules.families.registry import TaskFamily, register
from clantune_scale.bench.schedules.families.task import NUM_VALIDATION, SampledTask, Task
from clantune_scale.bench.schedules.problem import stream
from clantune_scale.bench.schedules.problems.layers import normal_parameters


class Valley(Task):
    """Rosenbrock's curved valley in several dimensions; a sample pulls every coordinate in a direction of its own."""

    def __init__(self, draw: Draw) -> None:
        self._size, self._steepness = 2 * draw.choice((2, 5, 10)), draw.log_uniform(3.0, 30.0)
        self._noise, self._key = draw.choice((0.0, 0.3, 1.0)), draw.key()
        self.batch_size = draw.choice((16, 32))
        generator = torch.Generator().manual_seed(self._key)
        self.validation = [torch.randn(NUM_VALIDATION, self._size, generator=generator)]
        self.test = [torch.zeros(1, self._size)]

    def init(self, seed: int) -> Tensors:
        return normal_parameters(seed, [((self._size,), 0.7)])

    def batch(self, seed: int, step: int, part: int) -> Tensors:
        return [torch.randn(self.batch_size, self._size, generator=stream(self._key, seed, step, part))]

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        first, second = parameters[0][:, 0::2], parameters[0][:, 1::2]
        floor = (1 - first).square() + self._steepness * (second - first.square()).square()
        pull = self._noise * (parameters[0].unsqueeze(1) * batch[0]).mean(dim=-1)
        return floor.mean(dim=-1, keepdim=True) + pull


class Policy(SampledTask):
    """A policy from logged actions with noisy rewards, weighted by how likely they were: the loss is minus the reward.

    Test samples have the expected reward of every action in place of one action and its reward.
    """

    def __init__(self, draw: Draw) -> None:
        features, actions = draw.whole(4, 12), draw.choice((2, 4, 6))
        generator = torch.Generator().manual_seed(draw.key())
        self._rewards = torch.randn(features, actions, generator=generator) / math.sqrt(features)
        self._noise, self._num_actions = draw.uniform(0.2, 1.0), actions
        self._network = Perceptron.drawn(draw, features, actions)
        self.collect(draw, batch_sizes=(32, 64))

    def init(self, seed: int) -> Tensors:
        return self._network.init(seed)

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        chances = functional.softmax(self._network(parameters, batch[0]), dim=-1)
        if len(batch) == 2:
            return -(chances * batch[1]).sum(dim=-1)
        taken = chances.gather(-1, batch[1].unsqueeze(-1)).squeeze(-1)
        return -self._num_actions * taken * batch[2]

    def samples(self, generator: torch.Generator, count: int, part: str) -> list[torch.Tensor]:
        contexts = torch.randn(count, len(self._rewards), generator=generator)
        expected = torch.sin(2 * contexts @ self._rewards)
        if part == "test":
            return [contexts, expected]
        actions = torch.randint(0, self._num_actions, (count,), generator=generator)
        rewards = expected.gather(1, actions.unsqueeze(1)).squeeze(1)
        return [contexts, actions, rewards + self._noise * torch.randn(count, generator=generator)]


class Density(SampledTask):
    """The likelihood of a mixture of Gaussians, whose means, widths and weights are what trains."""

    def __init__(self, draw: Draw) -> None:
        self._dims, clusters = draw.choice((2, 3, 6)), draw.choice((4, 8))
        generator = torch.Generator().manual_seed(draw.key())
        self._centres = 3 * torch.randn(clusters, self._dims, generator=generator)
        self._widths = 0.2 + torch.rand(clusters, 1, generator=generator)
        self._components = clusters + draw.choice((0, 4))
        self.collect(draw)

    def init(self, seed: int) -> Tensors:
        shape = (self._components, self._dims)
        means, logs, weights = normal_parameters(seed, [(shape, 1.0), (shape, 0.0), ((self._components,), 0.0)])
        return [means, logs + 0.7, weights]

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        means, logs, weights = (parameter.unsqueeze(1) for parameter in parameters)
        distance = (batch[0].unsqueeze(2) - means) * torch.exp(-logs)
        each = -0.5 * distance.square().sum(dim=-1) - logs.sum(dim=-1)
        return -torch.logsumexp(each + functional.log_softmax(weights, dim=-1), dim=-1)

    def samples(self, generator: torch.Generator, count: int, part: str) -> list[torch.Tensor]:
        which = torch.randint(0, len(self._centres), (count,), generator=generator)
        noise = self._widths[which] * torch.randn(count, self._dims, generator=generator)
        return [self._centres[which] + noise]


register(TaskFamily("valley", Valley))
register(TaskFamily("policy", Policy))
register(TaskFamily("density", Density))
