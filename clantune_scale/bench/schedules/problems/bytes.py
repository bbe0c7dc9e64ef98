"""The next byte of the Python standard library's own sources, by a perceptron and by a transformer of one block."""

from __future__ import annotations

import functools
import math
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from clantune_scale.bench.batched import Settings
from clantune_scale.bench.batched.model import Knobs, Tensors
from clantune_scale.bench.schedules.problem import Grid, Problem, quarter_decades, stream
from clantune_scale.bench.schedules.problems.layers import affine, cross_entropy, embed, normal_parameters

TOKENS = 64
MAX_BYTES = 4_000_000


@functools.cache
def sources() -> torch.Tensor:
    """[bytes] int64: the library's modules, one after another; its 63 commonest bytes, and one token for the rest."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    raw = np.frombuffer(b"".join(path.read_bytes() for path in files)[:MAX_BYTES], dtype=np.uint8)
    commonest = np.argsort(-np.bincount(raw, minlength=256), kind="stable")[: TOKENS - 1]
    tokens = np.full(256, TOKENS - 1)
    tokens[commonest] = np.arange(TOKENS - 1)
    return torch.tensor(tokens[raw])


class Bytes(Problem):
    """What both networks have in common: windows of ``context`` + 1 bytes.

    Args:
        name: in tables.
        optimizer: ``"adamw"`` or ``"sgd"``.
        context: bytes that are read.
        num_validation, num_test: windows.
    """

    def __init__(self, name: str, optimizer: str, context: int, num_validation: int, num_test: int) -> None:
        self.name = f"{name}-{optimizer}"
        is_adam = optimizer == "adamw"
        decay = 0.05 if is_adam else 1e-4
        self.settings = Settings(optimizer, weight_decay=decay)
        decays = (0.0, decay, 8 * decay) if is_adam else (0.0, decay)
        self.grid = Grid(quarter_decades(-4.0 if is_adam else -3.25), weight_decays=decays)
        self._context, self._offsets = context, torch.arange(context + 1)
        train = int(0.8 * len(sources()))
        self._train, held_out = sources()[:train], sources()[train:]
        self.num_samples = train - context
        half = len(held_out) // 2
        self.validation = self._windows(held_out[:half], num_validation, torch.Generator().manual_seed(9))
        self.test = self._windows(held_out[half:], num_test, torch.Generator().manual_seed(10))

    def batch(self, seed: int, step: int, part: int) -> Tensors:
        return self._windows(self._train, self.batch_size, stream(4, seed, step, part))

    def _windows(self, text: torch.Tensor, count: int, generator: torch.Generator) -> list[torch.Tensor]:
        starts = torch.randint(0, len(text) - self._context, (count, 1), generator=generator)
        return [text[starts + self._offsets]]


class BytesPerceptron(Bytes):
    """Six bytes in, one out: an embedding and one hidden layer (Bengio et al. 2003)."""

    WIDTH, HIDDEN = 8, 48

    def __init__(self, optimizer: str) -> None:
        super().__init__("bytes-mlp", optimizer, context=6, num_validation=256, num_test=4096)

    def init(self, seed: int) -> Tensors:
        inputs = self._context * self.WIDTH
        shapes = [
            ((TOKENS, self.WIDTH), 0.5),
            ((inputs, self.HIDDEN), 2 / math.sqrt(inputs)),
            ((self.HIDDEN,), 0.0),
            ((self.HIDDEN, TOKENS), 0.5 / math.sqrt(self.HIDDEN)),
            ((TOKENS,), 0.0),
        ]
        return normal_parameters(seed, shapes)

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        inputs = embed(parameters[0], batch[0][..., :-1]).flatten(2)
        hidden = torch.tanh(affine(inputs, *parameters[1:3]))
        return cross_entropy(affine(hidden, *parameters[3:5]), batch[0][..., -1])


class BytesTransformer(Bytes):
    """One pre-norm block of two heads over 16 bytes; a sample's loss is the mean over its positions."""

    WIDTH, HEADS, HIDDEN = 24, 2, 72
    total_steps = 600
    batch_size = 8

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__("bytes-transformer", optimizer, context=16, num_validation=192, num_test=1024)
        self.grid = Grid(quarter_decades(-3.5, 9), ("constant", "linear"), (self.settings.weight_decay,))
        self._mask = torch.full((self._context, self._context), -1e9).triu(1)

    def init(self, seed: int) -> Tensors:
        width, hidden = self.WIDTH, self.HIDDEN
        scale = width**-0.5
        shapes = [
            ((TOKENS, width), 0.5),
            ((self._context, width), 0.2),
            ((width, 3 * width), scale),
            ((3 * width,), 0.0),
            ((width, width), 0.7 * scale),
            ((width,), 0.0),
            ((width, hidden), scale),
            ((hidden,), 0.0),
            ((hidden, width), 0.4 * scale),
            ((width,), 0.0),
            ((width, TOKENS), 0.5 * scale),
            ((TOKENS,), 0.0),
        ]
        return normal_parameters(seed, shapes)

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        models, samples = batch[0].shape[:2]
        positions = parameters[1].view(models, 1, self._context, self.WIDTH)
        stream_ = (embed(parameters[0], batch[0][..., :-1]) + positions).flatten(1, 2)
        stream_ = stream_ + affine(self._attended(stream_, parameters, samples), *parameters[4:6])
        hidden = torch.relu(affine(self._normed(stream_), *parameters[6:8]))
        stream_ = stream_ + affine(hidden, *parameters[8:10])
        logits = affine(self._normed(stream_), *parameters[10:12])
        losses = cross_entropy(logits, batch[0][..., 1:].flatten(1, 2))
        return losses.view(models, samples, self._context).mean(dim=-1)

    def _attended(self, stream_: torch.Tensor, parameters: Tensors, samples: int) -> torch.Tensor:
        """[models, samples x context, width]"""
        models, size = len(stream_), self.WIDTH // self.HEADS
        projected = affine(self._normed(stream_), *parameters[2:4])
        heads = projected.view(models * samples, self._context, 3, self.HEADS, size).permute(2, 0, 3, 1, 4)
        query, key, value = heads.reshape(3, -1, self._context, size)
        scores = torch.baddbmm(self._mask, query, key.transpose(1, 2), alpha=size**-0.5)
        mixed = torch.bmm(torch.softmax(scores, dim=-1), value)
        mixed = mixed.view(models * samples, self.HEADS, self._context, size).transpose(1, 2)
        return mixed.reshape(models, samples * self._context, self.WIDTH)

    def _normed(self, stream_: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(stream_, (self.WIDTH,))
