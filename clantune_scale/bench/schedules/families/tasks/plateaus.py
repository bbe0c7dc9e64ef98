"""Losses that stand still, or rise, before they fall: parity, deep linear networks, sums over time, a shortcut."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from clantune_scale.bench.batched.model import Knobs, Tensors
from clantune_scale.bench.schedules.families.draw import Draw
from clantune_scale.bench.schedules.families.networks import Perceptron
from clantune_scale.bench.schedules.families.registry import TaskFamily, register
from clantune_scale.bench.schedules.families.task import NUM_TEST, NUM_VALIDATION, SampledTask, Task
from clantune_scale.bench.schedules.problem import stream
from clantune_scale.bench.schedules.problems.layers import affine, cross_entropy, embed, normal_parameters


class Parity(SampledTask):
    """The parity of two or three bits among some that say nothing."""

    def __init__(self, draw: Draw) -> None:
        self._bits, self._counted = draw.whole(8, 20), draw.choice((2, 2, 3))
        self._network = Perceptron((self._bits, draw.whole(24, 64), 1), draw.choice(("relu", "tanh", "gelu")))
        self._flipped = draw.choice((0.0, 0.0, 0.05))
        self.collect(draw, fresh=0.8)

    def init(self, seed: int) -> Tensors:
        return self._network.init(seed)

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        margin = self._network(parameters, batch[0]).squeeze(-1) * batch[1]
        return functional.softplus(-margin)

    def samples(self, generator: torch.Generator, count: int, part: str) -> list[torch.Tensor]:
        bits = 2.0 * torch.randint(0, 2, (count, self._bits), generator=generator) - 1
        is_flipped = torch.rand(count, generator=generator) < self._flipped
        return [bits, bits[:, : self._counted].prod(dim=1) * torch.where(is_flipped, -1.0, 1.0)]


class DeepLinear(SampledTask):
    """A linear map by a product of matrices that starts near a saddle."""

    def __init__(self, draw: Draw) -> None:
        self._size, self._depth = draw.whole(6, 16), draw.choice((3, 4, 5))
        generator = torch.Generator().manual_seed(draw.key())
        rank = draw.choice((1, 3))
        left, right = torch.randn(2, self._size, rank, generator=generator)
        self._map = left @ right.T / self._size
        self._gain, self._noise = draw.uniform(0.3, 0.8), draw.choice((0.0, 0.2))
        self.collect(draw)

    def init(self, seed: int) -> Tensors:
        scale = self._gain * self._size**-0.5
        return normal_parameters(seed, [((self._size, self._size), scale)] * self._depth)

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        outputs = batch[0]
        for matrix in parameters:
            outputs = torch.bmm(outputs, matrix)
        return (outputs - batch[1]).square().sum(dim=-1)

    def samples(self, generator: torch.Generator, count: int, part: str) -> list[torch.Tensor]:
        inputs = torch.randn(count, self._size, generator=generator)
        return [inputs, inputs @ self._map + self._noise * torch.randn(count, self._size, generator=generator)]


class Adding(SampledTask):
    """The sum of two marked numbers in a sequence, by a recurrent network (Hochreiter and Schmidhuber 1997)."""

    def __init__(self, draw: Draw) -> None:
        self._length, self._width = draw.choice((6, 10)), draw.whole(16, 32)
        self.collect(draw, fresh=0.8, batch_sizes=(16, 32))

    def init(self, seed: int) -> Tensors:
        width = self._width
        shapes = [((2, width), 0.7), ((width, width), 0.9 * width**-0.5), ((width,), 0.0)]
        return normal_parameters(seed, [*shapes, ((width, 1), width**-0.5), ((1,), 0.0)])

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        models, samples = batch[0].shape[:2]
        state = batch[0].new_zeros(models, samples, self._width)
        for place in range(self._length):
            entered = affine(batch[0][:, :, place], parameters[0], parameters[2])
            state = torch.tanh(torch.baddbmm(entered, state, parameters[1]))
        return (affine(state, *parameters[3:5]).squeeze(-1) - batch[1]).square()

    def samples(self, generator: torch.Generator, count: int, part: str) -> list[torch.Tensor]:
        numbers = torch.rand(count, self._length, generator=generator)
        half = self._length // 2
        first, second = (torch.randint(0, half, (count, 1), generator=generator) for _ in range(2))
        marks = torch.zeros(count, self._length).scatter(1, first, 1.0).scatter(1, second + half, 1.0)
        return [torch.stack([numbers, marks], dim=2), (numbers * marks).sum(dim=1)]


class ModularSum(Task):
    """The sum of two numbers modulo a prime, from some of all pairs; the others are validation and test."""

    def __init__(self, draw: Draw) -> None:
        prime = draw.choice((11, 13, 17))
        self._prime, self._width, self._key = prime, draw.choice((12, 16)), draw.key()
        self._network = Perceptron((2 * self._width, draw.whole(32, 64), prime), "relu")
        pairs = torch.cartesian_prod(torch.arange(prime), torch.arange(prime))
        pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(self._key))]
        sums = pairs.sum(dim=1) % prime
        count = round(draw.uniform(0.6, 0.85) * len(pairs))
        self._pairs, self._sums, self.num_samples = pairs[:count], sums[:count], count
        self.batch_size = draw.choice((32, 64))
        held_out = len(pairs) - count
        middle = count + held_out // 2
        # Few pairs are held out, so that each is repeated; an evaluation of fewer would be cut into empty batches.
        self.validation = self._repeated(pairs[count:middle], sums[count:middle], NUM_VALIDATION // 4)
        self.test = self._repeated(pairs[middle:], sums[middle:], NUM_TEST // 4)

    def init(self, seed: int) -> Tensors:
        return normal_parameters(seed, [((self._prime, self._width), 0.5), *self._network.shapes()])

    def batch(self, seed: int, step: int, part: int) -> Tensors:
        generator = stream(self._key, seed, step, part)
        chosen = torch.randint(0, len(self._pairs), (self.batch_size,), generator=generator)
        return [self._pairs[chosen], self._sums[chosen]]

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        inputs = embed(parameters[0], batch[0]).flatten(2)
        return cross_entropy(self._network(parameters[1:], inputs), batch[1])

    @staticmethod
    def _repeated(pairs: torch.Tensor, sums: torch.Tensor, count: int) -> list[torch.Tensor]:
        times = math.ceil(count / len(pairs))
        return [pairs.repeat(times, 1), sums.repeat(times)]


class Shortcut(SampledTask):
    """A loud feature that mostly agrees with the label in training only, and quiet ones that say it for certain.

    The validation loss rises while the loud one is learned, and falls later.
    """

    def __init__(self, draw: Draw) -> None:
        self._features, self._agrees = draw.whole(4, 12), draw.uniform(0.8, 0.95)
        self._loud, self._quiet = draw.uniform(1.0, 2.0), draw.uniform(0.3, 0.6)
        generator = torch.Generator().manual_seed(draw.key())
        self._direction = functional.normalize(torch.randn(self._features, generator=generator), dim=0)
        self._network = Perceptron((1 + self._features, draw.whole(12, 32), 1), draw.choice(("tanh", "relu")))
        self.collect(draw, fresh=0.8)

    def init(self, seed: int) -> Tensors:
        return self._network.init(seed)

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        return functional.softplus(-self._network(parameters, batch[0]).squeeze(-1) * batch[1])

    def samples(self, generator: torch.Generator, count: int, part: str) -> list[torch.Tensor]:
        quiet = torch.randn(count, self._features, generator=generator)
        labels = torch.sign(quiet @ self._direction)
        agrees = torch.rand(count, generator=generator) < (self._agrees if part == "train" else 0.5)
        loud = self._loud * labels * torch.where(agrees, 1.0, -1.0)
        return [torch.cat([loud.unsqueeze(1), self._quiet * quiet], dim=1), labels]


register(TaskFamily("parity", Parity, steps=(600, 5000)))
register(TaskFamily("deep linear", DeepLinear))
register(TaskFamily("adding", Adding, steps=(600, 3000)))
register(TaskFamily("modular sum", ModularSum, steps=(1500, 5000)))
register(TaskFamily("shortcut", Shortcut, steps=(600, 5000)))
