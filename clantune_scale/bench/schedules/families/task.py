"""What a family of tasks draws: a model with its data, without an optimizer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch

from clantune_scale.bench.batched.model import Knobs, Tensors
from clantune_scale.bench.schedules.families.draw import Draw
from clantune_scale.bench.schedules.problem import stream

#: Samples of a clan in a step; all can be shared out by four and by eight members.
BATCH_SIZES = (16, 32, 64)
#: How often a task's data are new in every step, and else how many samples there are, at least and at most.
FRESH, FEWEST, MOST = 0.6, 256, 4096
#: Examples on which decisions are made, and on which the report is.
NUM_VALIDATION, NUM_TEST = 256, 1024


class Task(ABC):
    """A model and its data, pure functions throughout; see :class:`~clantune_scale.bench.batched.BatchedModel`.

    Attributes:
        batch_size: samples of the clan in a step.
        num_samples: different training samples; infinite if every one is new.
        validation, test: tensors [examples, ...].
    """

    batch_size: int = 32
    num_samples: float = math.inf
    validation: Tensors
    test: Tensors

    @abstractmethod
    def init(self, seed: int) -> Tensors:
        """One model's initial parameters."""

    @abstractmethod
    def batch(self, seed: int, step: int, part: int) -> Tensors:
        """Training samples, tensors [batch_size, ...]."""

    @abstractmethod
    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        """[models, samples]."""


class SampledTask(Task):
    """A task whose samples come from a generator of random numbers.

    Derive from it, draw the attributes that ``samples`` needs, and call :meth:`collect` last.
    """

    def collect(self, draw: Draw, *, fresh: float = FRESH, batch_sizes: tuple[int, ...] = BATCH_SIZES) -> None:
        """Draws the batch size and the data.

        Args:
            draw: the task's.
            fresh: how often every training sample is new; else there are few, and each is seen again and again.
            batch_sizes: to choose from.
        """
        self._key = draw.key()
        self.batch_size = draw.choice(batch_sizes)
        is_fresh, count = draw.chance(fresh), draw.whole(FEWEST, MOST)
        self._pool = None if is_fresh else self._part("train", count)
        self.num_samples = math.inf if is_fresh else count
        self.validation = self._part("validation", NUM_VALIDATION)
        self.test = self._part("test", NUM_TEST)

    @abstractmethod
    def samples(self, generator: torch.Generator, count: int, part: str) -> list[torch.Tensor]:
        """Tensors [count, ...].

        Args:
            generator: of all that is random in them.
            count: of samples.
            part: ``"train"``, ``"validation"`` or ``"test"``.
        """

    def batch(self, seed: int, step: int, part: int) -> Tensors:
        generator = stream(self._key, seed, step, part)
        if self._pool is None:
            return self.samples(generator, self.batch_size, "train")
        chosen = torch.randint(0, len(self._pool[0]), (self.batch_size,), generator=generator)
        return [column[chosen] for column in self._pool]

    def _part(self, part: str, count: int) -> list[torch.Tensor]:
        seed = self._key + ("train", "validation", "test").index(part)
        return self.samples(torch.Generator().manual_seed(seed), count, part)
