"""What a scheduling problem is: a task with its data, an optimizer, and the configurations that runs start from."""

from __future__ import annotations

import copy
import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from clantune_scale.bench.batched import Settings
from clantune_scale.bench.batched.model import Knobs, Tensors
from clantune_scale.config.default_genes import default_genes
from clantune_scale.core.rounds import sees_samples_once


@dataclass(frozen=True)
class Start:
    """A configuration that a run starts from.

    Attributes:
        name: a column of the table.
        rate: times the learning rate that ``anchor`` names.
        changes: fields of :class:`~clantune_scale.bench.batched.Settings` besides ``lr``, in place of the problem's.
        anchor: ``"constant"``, the best constant rate; ``"tuned"``, the best peak of the problem's own schedule, which
            its grid must have; ``"oracle"``, the oracle's rate, and then its schedule and its weight decay as well.
        kind: what starts are grouped by in tables (``"wild"``, ``"tuned"``, ``"oracle"``, ``"wrong decay"``, ...).
        schedule: name of a learning-rate curve in place of the problem's own; None keeps that.
    """

    name: str
    rate: float = 1.0
    changes: Mapping[str, Any] = field(default_factory=dict)
    anchor: Literal["constant", "tuned", "oracle"] = "constant"
    kind: str = "wild"
    schedule: str | None = None


#: The study's starts: the best constant learning rate, and half a decade and a decade below and above it.
STARTS = tuple(Start(f"{factor:g}x", factor) for factor in (0.1, 0.32, 1.0, 3.2, 10.0))


@dataclass(frozen=True)
class Grid:
    """What the oracle searches, exhaustively.

    Attributes:
        rates: ascending.
        schedules: names in :data:`clantune_scale.bench.schedules.curves.CURVES`.
        weight_decays: the problem's own among them.
        reach: how many rates below and above the best constant one are searched, and further as long as a schedule's
            best one lies at the edge; every second constant rate is tried before. None searches all rates.
    """

    rates: tuple[float, ...]
    schedules: tuple[str, ...] = ("constant", "cosine", "linear", "warmup-linear")
    weight_decays: tuple[float, ...] = (0.0,)
    reach: tuple[int, int] | None = None


def quarter_decades(lowest: float, count: int = 13) -> tuple[float, ...]:
    """``count`` learning rates from 10 ** ``lowest`` on, a factor 10 ** 0.25 apart."""
    return tuple(10 ** (lowest + 0.25 * i) for i in range(count))


class Problem(ABC):
    """A task to schedule: a :class:`~clantune_scale.bench.batched.BatchedModel` with the settings of its benchmark.

    Derive from it, set what differs, and name an instance, or a list of them, with ``--problems module:NAME``.
    Everything is a pure function of its arguments.

    Attributes:
        name: in tables.
        total_steps: T.
        batch_size: samples of the clan in a step.
        settings: what the user configured, but for the learning rate and its schedule.
        schedule: the user's own, a name in :data:`clantune_scale.bench.schedules.curves.CURVES`.
        grid: the oracle's.
        starts: of its runs.
        extra_genes: of the clans that run on it, besides the default ones, by name in the catalogue of genes.
        num_samples: different training samples; infinite if every one is new.
        validation: the common window, tensors [examples, ...]; selection sees nothing else, and in a short run only
            a part of it (``trial.window``).
        test: likewise, only for the report.
        knows_length: whether strategies are told ``total_steps``.
        group_of: [parameters] the name of each one's parameter group; empty if there is one group.
        is_reporting: whether it is only for reports, which say so.
    """

    name: str
    total_steps: int = 1200
    batch_size: int = 64
    settings: Settings = Settings()
    schedule: str = "constant"
    grid: Grid = Grid(quarter_decades(-4.0))
    starts: Sequence[Start] = STARTS
    extra_genes: tuple[str, ...] = ()
    num_samples: float = math.inf
    validation: Tensors
    test: Tensors
    knows_length: bool = True
    group_of: Sequence[str] = ()
    is_reporting: bool = False

    @abstractmethod
    def init(self, seed: int) -> Tensors:
        """One model's initial parameters."""

    @abstractmethod
    def batch(self, seed: int, step: int, part: int) -> Tensors:
        """Training samples; see :class:`~clantune_scale.bench.batched.BatchedModel`."""

    @abstractmethod
    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        """[models, samples]; see :class:`~clantune_scale.bench.batched.BatchedModel`."""

    def variant(self, name: str, **changes: object) -> Problem:
        """A copy called ``name`` with other attributes; the oracle is the same one if only starts differ."""
        changed = copy.copy(self)
        for attribute, value in {"name": name, **changes}.items():
            if not hasattr(self, attribute):
                raise AttributeError(f"problem {self.name!r} has no attribute {attribute!r} to vary")
            setattr(changed, attribute, value)
        return changed

    @property
    def sees_samples_once(self) -> bool:
        """Whether a run sees no training sample twice."""
        return sees_samples_once(self.num_samples, batch_size=self.batch_size, num_steps=self.total_steps)

    def genes_of(self, strategy: str, settings: Settings) -> tuple[str, ...]:
        """The genes of a clan with this strategy that is configured so: the default ones, then the problem's own.

        As in a real run, a gene that multiplies a weight decay of 0 is left out.
        """
        genes = default_genes(
            strategy,
            sees_samples_once=self.sees_samples_once,
            optimizer=settings.optimizer,
            weight_decays=[settings.weight_decay],
        )
        names = (*genes, *(name for name in self.extra_genes if name not in genes))
        return names if settings.weight_decay else tuple(name for name in names if name != "weight_decay")

    def fingerprint(self) -> str:
        """Equal for problems with one oracle: same numbers at the start, same length, same grid.

        Losses enter with four digits, so that another processor's rounding does not change it, and other
        data (another Python's library to read) does.
        """
        numbers = [self.total_steps, self.batch_size, *self.grid.rates, *self.grid.weight_decays]
        words = [self.settings.optimizer, repr(self.settings.base()), *self.grid.schedules]
        numbers += [float(f"{loss:.4g}") for loss in self._first_losses()]
        return hashlib.blake2b(repr((numbers, words)).encode(), digest_size=8).hexdigest()

    @torch.no_grad()
    def _first_losses(self) -> list[float]:
        """Mean losses before training: on validation and test data, and on a batch of the first and the last step."""
        parameters = [parameter.unsqueeze(0) for parameter in self.init(0)]
        last = self.total_steps - 1
        samples = (self.validation, self.test, self.batch(0, 0, 0), self.batch(0, last, 0))
        losses = [self.losses(parameters, [x.unsqueeze(0) for x in part], {}).mean() for part in samples]
        return [float(loss) if math.isfinite(loss) else math.inf for loss in losses]


def stream(problem: int, seed: int, step: int, part: int) -> torch.Generator:
    """Randomness of one batch: a stream of its own for every problem, seed, step and part."""
    words = torch.tensor([problem, seed, step, part]) % 2**31
    key = 0
    for word in words.tolist():  # a linear mix: neighbouring steps must not get neighbouring seeds of one stream
        key = (key * 6364136223846793005 + word + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(key)
