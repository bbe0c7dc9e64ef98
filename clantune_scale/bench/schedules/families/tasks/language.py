"""Small language models of several kinds on several texts that come with Python."""

from __future__ import annotations

import functools
import importlib
import unicodedata
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from clantune_scale.bench.batched.model import Knobs, Tensors
from clantune_scale.bench.schedules.families.draw import Draw
from clantune_scale.bench.schedules.families.networks import Perceptron, Shapes
from clantune_scale.bench.schedules.families.registry import TaskFamily, register
from clantune_scale.bench.schedules.families.task import SampledTask
from clantune_scale.bench.schedules.problems.bytes import sources
from clantune_scale.bench.schedules.problems.layers import affine, cross_entropy, embed, normal_parameters

#: Different tokens of every text: the commonest bytes, and one for the rest.
TOKENS = 40
MAX_BYTES = 600_000


def _prose() -> bytes:
    """The reference manual's pages that Python's help() shows."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n".join(topics[name] for name in sorted(topics)).encode()


def _names() -> bytes:
    """The names of characters, one a line."""
    found = (unicodedata.name(chr(point), "") for point in range(0x20, 0x3000))
    return "\n".join(filter(None, found)).encode()


def _chain() -> bytes:
    """A chain in which the next of 24 symbols depends on the last two."""
    generator = np.random.RandomState(17)  # whose streams are promised to stay what they are
    odds = generator.gamma(0.15, size=(24, 24, 24)) + 1e-6
    bounds = np.cumsum(odds / odds.sum(axis=2, keepdims=True), axis=2)
    symbols, draws = [0, 1], generator.random_sample(200_000)
    for number in draws:
        row = bounds[symbols[-2], symbols[-1]]
        symbols.append(min(23, int(np.searchsorted(row, number))))
    return bytes(65 + symbol for symbol in symbols)


TEXTS: dict[str, Callable[[], bytes]] = {
    "code": lambda: bytes(sources()[:MAX_BYTES].tolist()),
    "prose": _prose,
    "names": _names,
    "chain": _chain,
}


@functools.cache
def tokens(text: str) -> torch.Tensor:
    """[bytes] int64: a text as tokens, below ``TOKENS``."""
    raw = np.frombuffer(TEXTS[text]()[:MAX_BYTES], dtype=np.uint8)
    commonest = np.argsort(-np.bincount(raw, minlength=256), kind="stable")[: TOKENS - 1]
    table = np.full(256, TOKENS - 1)
    table[commonest] = np.arange(TOKENS - 1)
    return torch.tensor(table[raw])


class Language(SampledTask):
    """Windows of a text; a sample's loss is the mean over the positions that are predicted.

    Args:
        draw: of sizes and data.
        context: tokens that are read.
        batch_sizes: to choose from.
        text: a name in ``TEXTS``; drawn if none is given.
    """

    def __init__(self, draw: Draw, *, context: int, batch_sizes: tuple[int, ...], text: str | None = None) -> None:
        drawn = draw.choice(list(TEXTS))
        self._text, self._context = text or drawn, context
        self._offsets = torch.arange(context + 1)
        # A short text is seen several times.
        self._share = draw.choice((1.0, 1.0, 0.02))
        self.collect(draw, fresh=1.0, batch_sizes=batch_sizes)
        self.num_samples = self._stretch("train")[1]

    def samples(self, generator: torch.Generator, count: int, part: str) -> list[torch.Tensor]:
        first, length = self._stretch(part)
        starts = first + torch.randint(0, length, (count, 1), generator=generator)
        return [tokens(self._text)[starts + self._offsets]]

    def _stretch(self, part: str) -> tuple[int, int]:
        """Where windows of a part begin at the earliest, and how many places there are."""
        total = len(tokens(self._text))
        train, validation = int(0.8 * total), int(0.1 * total)
        begin, length = {
            "train": (0, int(self._share * train)),
            "validation": (train, validation),
            "test": (train + validation, total - train - validation),
        }[part]
        return begin, length - self._context


class LanguagePerceptron(Language):
    """The next token from a few: an embedding and one hidden layer (Bengio et al. 2003)."""

    def __init__(self, draw: Draw, *, text: str | None = None) -> None:
        context, self._width = draw.choice((3, 5, 8)), draw.choice((6, 10))
        self._network = Perceptron((context * self._width, draw.whole(24, 56), TOKENS), draw.choice(("tanh", "relu")))
        super().__init__(draw, context=context, batch_sizes=(16, 32, 64), text=text)

    def init(self, seed: int) -> Tensors:
        return normal_parameters(seed, [((TOKENS, self._width), 0.5), *self._network.shapes()])

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        inputs = embed(parameters[0], batch[0][..., :-1]).flatten(2)
        return cross_entropy(self._network(parameters[1:], inputs), batch[0][..., -1])


class LanguageConvolution(Language):
    """Two causal convolutions over three places each, with a residual."""

    REACH = 3

    def __init__(self, draw: Draw) -> None:
        self._width = draw.choice((16, 24))
        super().__init__(draw, context=draw.choice((8, 12)), batch_sizes=(8, 16))

    def init(self, seed: int) -> Tensors:
        width, inputs = self._width, self.REACH * self._width
        layer: Shapes = [((inputs, width), inputs**-0.5), ((width,), 0.0)]
        shapes: Shapes = [
            ((TOKENS, width), 0.7),
            *layer,
            *layer,
            ((width, TOKENS), 0.5 * width**-0.5),
            ((TOKENS,), 0.0),
        ]
        return normal_parameters(seed, shapes)

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        models, samples = batch[0].shape[:2]
        places = embed(parameters[0], batch[0][..., :-1])
        for layer in (1, 3):
            padded = functional.pad(places, (0, 0, self.REACH - 1, 0))
            windows = padded.unfold(2, self.REACH, 1).flatten(-2).flatten(1, 2)
            found = functional.gelu(affine(windows, *parameters[layer : layer + 2]))
            places = places + found.view(models, samples, self._context, -1)
        logits = affine(places.flatten(1, 2), *parameters[5:7])
        return cross_entropy(logits, batch[0][..., 1:].flatten(1, 2)).view(models, samples, -1).mean(dim=-1)


class LanguageRecurrent(Language):
    """A gated recurrent network with one gate (minimal gated unit, Zhou et al. 2016)."""

    def __init__(self, draw: Draw) -> None:
        self._width = draw.choice((16, 24, 32))
        super().__init__(draw, context=draw.choice((6, 10)), batch_sizes=(8, 16))

    def init(self, seed: int) -> Tensors:
        width = self._width
        gate: Shapes = [((2 * width, width), (2 * width) ** -0.5), ((width,), 0.0)]
        return normal_parameters(
            seed, [((TOKENS, width), 0.7), *gate, *gate, ((width, TOKENS), width**-0.5), ((TOKENS,), 0.0)]
        )

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        inputs = embed(parameters[0], batch[0][..., :-1])
        state, states = torch.zeros_like(inputs[:, :, 0]), []
        for place in range(self._context):
            own = inputs[:, :, place]
            gate = torch.sigmoid(affine(torch.cat([own, state], dim=-1), *parameters[1:3]))
            new = torch.tanh(affine(torch.cat([own, gate * state], dim=-1), *parameters[3:5]))
            state = torch.lerp(state, new, gate)
            states.append(state)
        logits = affine(torch.stack(states, dim=2).flatten(1, 2), *parameters[5:7])
        targets = batch[0][..., 1:]
        return cross_entropy(logits, targets.flatten(1, 2)).view(targets.shape).mean(dim=-1)


class LanguageTransformer(Language):
    """One pre-norm block with one head of attention."""

    def __init__(self, draw: Draw) -> None:
        self._width, self._hidden = draw.choice((12, 16, 24)), draw.choice((32, 48))
        super().__init__(draw, context=draw.choice((8, 12)), batch_sizes=(8,))
        self._mask = torch.full((self._context, self._context), -1e9).triu(1)

    def init(self, seed: int) -> Tensors:
        width, hidden, scale = self._width, self._hidden, self._width**-0.5
        shapes: Shapes = [((TOKENS, width), 0.5), ((self._context, width), 0.2), ((width, 3 * width), scale)]
        shapes += [((width, width), scale), ((width, hidden), scale), ((hidden,), 0.0)]
        shapes += [((hidden, width), 0.5 * hidden**-0.5), ((width,), 0.0), ((width, TOKENS), 0.5 * scale)]
        return normal_parameters(seed, [*shapes, ((TOKENS,), 0.0)])

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        models, samples = batch[0].shape[:2]
        places = (embed(parameters[0], batch[0][..., :-1]) + parameters[1].unsqueeze(1)).flatten(1, 2)
        places = places + torch.bmm(self._attended(places, parameters[2], samples), parameters[3])
        hidden = functional.gelu(affine(self._normed(places), *parameters[4:6]))
        places = places + affine(hidden, *parameters[6:8])
        logits = affine(self._normed(places), *parameters[8:10])
        targets = batch[0][..., 1:]
        return cross_entropy(logits, targets.flatten(1, 2)).view(models, samples, -1).mean(dim=-1)

    def _attended(self, places: torch.Tensor, projection: torch.Tensor, samples: int) -> torch.Tensor:
        """[models, samples x context, width]"""
        projected = torch.bmm(self._normed(places), projection).view(-1, self._context, 3 * self._width)
        query, key, value = projected.chunk(3, dim=-1)
        scores = torch.baddbmm(self._mask, query, key.mT, alpha=self._width**-0.5)
        return torch.bmm(torch.softmax(scores, dim=-1), value).view(places.shape)

    def _normed(self, places: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(places, (self._width,))


register(TaskFamily("language, perceptron", LanguagePerceptron, steps=(300, 3000)))
register(TaskFamily("language, convolution", LanguageConvolution, steps=(300, 2000)))
register(TaskFamily("language, recurrent", LanguageRecurrent, steps=(300, 1500)))
register(TaskFamily("language, transformer", LanguageTransformer, steps=(300, 1500)))
