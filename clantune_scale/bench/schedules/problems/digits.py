"""Handwritten digits, 8 x 8 pixels under heavy noise (scikit-learn's bundled set), by two small networks."""

from __future__ import annotations

import functools
import math

import torch
from torch.nn import functional

from clantune_scale.bench.batched import Settings
from clantune_scale.bench.batched.model import Knobs, Tensors
from clantune_scale.bench.schedules.problem import Grid, Problem, quarter_decades, stream
from clantune_scale.bench.schedules.problems.layers import affine, cross_entropy, normal_parameters
from clantune_scale.errors import ConfigError

PIXELS, CLASSES, WIDTH = 64, 10, 32
TRAIN, VALIDATION = 1000, 256
NOISE = 0.9


@functools.cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [images, 64] between -1 and 1, and labels [images], in a fixed random order.

    Raises:
        ConfigError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "the digits problems need scikit-learn, which is not installed. Run: pip install 'clantune-scale[bench]'"
        ) from error
    bundled = load_digits()
    order = torch.randperm(len(bundled.data), generator=torch.Generator().manual_seed(5))
    pixels = torch.tensor(bundled.data, dtype=torch.float32) / 8 - 1
    return pixels[order], torch.tensor(bundled.target)[order]


class Digits(Problem):
    """What both networks have in common: the data.

    Args:
        network: for the name.
        optimizer: ``"adamw"`` or ``"sgd"``.
    """

    def __init__(self, network: str, optimizer: str) -> None:
        self.name = f"digits-{network}-{optimizer}"
        is_adam = optimizer == "adamw"
        decay = 0.05 if is_adam else 1e-3
        self.settings = Settings(optimizer, weight_decay=decay)
        self._pixels, self._labels = (column[:TRAIN] for column in digits())
        self.num_samples = TRAIN
        held_out = [column[TRAIN:] for column in digits()]
        self.validation = self._noisy([column[:VALIDATION] for column in held_out], 3)
        self.test = self._noisy([torch.cat([column[VALIDATION:]] * 4) for column in held_out], 4)
        decays = (0.0, decay, 8 * decay) if is_adam else (0.0, decay)
        self.grid = Grid(quarter_decades(-4.0 if is_adam else -3.25), weight_decays=decays)

    def batch(self, seed: int, step: int, part: int) -> Tensors:
        generator = stream(3, seed, step, part)
        chosen = torch.randint(0, TRAIN, (self.batch_size,), generator=generator)
        noise = NOISE * torch.randn(self.batch_size, PIXELS, generator=generator)
        return [self._pixels[chosen] + noise, self._labels[chosen]]

    def _noisy(self, columns: list[torch.Tensor], seed: int) -> list[torch.Tensor]:
        noise = torch.randn(columns[0].shape, generator=torch.Generator().manual_seed(seed))
        return [columns[0] + NOISE * noise, columns[1]]


class DigitsPerceptron(Digits):
    """One hidden layer."""

    def __init__(self, optimizer: str) -> None:
        super().__init__("mlp", optimizer)

    def init(self, seed: int) -> Tensors:
        shapes = [((PIXELS, WIDTH), 1 / 8), ((WIDTH,), 0.0), ((WIDTH, CLASSES), WIDTH**-0.5), ((CLASSES,), 0.0)]
        return normal_parameters(seed, shapes)

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        hidden = torch.relu(affine(batch[0], *parameters[0:2]))
        return cross_entropy(affine(hidden, *parameters[2:4]), batch[1])


class DigitsConvolution(Digits):
    """Two convolutions of stride 2 and a linear layer; convolutions as products over patches, one per model."""

    def __init__(self, optimizer: str) -> None:
        super().__init__("cnn", optimizer)
        self.grid = Grid(self.grid.rates, ("constant", "linear", "warmup-linear"), (self.settings.weight_decay,))
        places = torch.arange(81).view(9, 9)
        corners = [(row, column) for row in range(0, 8, 2) for column in range(0, 8, 2)]
        self._patches = torch.cat([places[row : row + 3, column : column + 3].flatten() for row, column in corners])

    def init(self, seed: int) -> Tensors:
        shapes = [
            ((9, 8), 1 / 3),
            ((8,), 0.0),
            ((72, 12), 1 / math.sqrt(72)),
            ((12,), 0.0),
            ((48, CLASSES), 1 / math.sqrt(48)),
            ((CLASSES,), 0.0),
        ]
        return normal_parameters(seed, shapes)

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        models, samples = batch[0].shape[:2]
        padded = functional.pad(batch[0].reshape(-1, 8, 8), (1, 0, 1, 0)).view(-1, 81)
        patches = padded.index_select(1, self._patches).view(models, samples * 16, 9)
        hidden = torch.relu(affine(patches, *parameters[0:2])).view(models, samples, 4, 4, 8)
        hidden = functional.pad(hidden, (0, 0, 1, 0, 1, 0))
        windows = [hidden[:, :, row : row + 3 : 2, column : column + 3 : 2] for row in range(3) for column in range(3)]
        patches = torch.cat(windows, dim=-1).view(models, samples * 4, 72)
        hidden = torch.relu(affine(patches, *parameters[2:4])).view(models, samples, 48)
        return cross_entropy(affine(hidden, *parameters[4:6]), batch[1])
