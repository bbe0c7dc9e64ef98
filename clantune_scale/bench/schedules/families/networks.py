"""Networks of many models at once that families of tasks share."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from clantune_scale.bench.batched.model import Tensors
from clantune_scale.bench.schedules.families.draw import Draw
from clantune_scale.bench.schedules.problems.layers import affine, normal_parameters

#: (shape, standard deviation) of parameters, as ``normal_parameters`` takes them.
Shapes = list[tuple[tuple[int, ...], float]]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
}


@dataclass(frozen=True)
class Perceptron:
    """Linear layers with an activation between them.

    Attributes:
        sizes: of inputs, hidden layers, outputs.
        activation: a name in ``ACTIVATIONS``.
        gain: of the initial weights.
        normalizes: whether hidden layers are normalized after their activation.
    """

    sizes: tuple[int, ...]
    activation: str = "tanh"
    gain: float = 1.0
    normalizes: bool = False

    @classmethod
    def drawn(cls, draw: Draw, inputs: int, outputs: int, *, widths: tuple[int, int] = (16, 48)) -> Perceptron:
        """One to three hidden layers of one width."""
        depth, width = draw.choice((1, 1, 2, 2, 3)), draw.whole(*widths)
        activation, normalizes = draw.choice(list(ACTIVATIONS)), draw.chance(0.25)
        return cls((inputs, *[width] * depth, outputs), activation, normalizes=normalizes)

    @property
    def num_parameters(self) -> int:
        """Tensors that :meth:`init` makes."""
        return 2 * (len(self.sizes) - 1)

    def shapes(self) -> Shapes:
        """Of its parameters."""
        found: Shapes = []
        for inputs, outputs in itertools.pairwise(self.sizes):
            found += [((inputs, outputs), self.gain * inputs**-0.5), ((outputs,), 0.0)]
        return found

    def init(self, seed: int) -> Tensors:
        """One model's parameters."""
        return normal_parameters(seed, self.shapes())

    def __call__(self, parameters: Tensors, inputs: torch.Tensor) -> torch.Tensor:
        """[models, samples, out], from ``inputs`` [models, samples, in]."""
        last = self.num_parameters - 2
        for index in range(0, last + 2, 2):
            inputs = affine(inputs, *parameters[index : index + 2])
            if index < last:
                inputs = ACTIVATIONS[self.activation](inputs)
                if self.normalizes:
                    inputs = functional.layer_norm(inputs, inputs.shape[-1:])
        return inputs
