"""Families of tasks, optimizers and schedules, by name, and how to add one.

A family is one small object, and :func:`register` makes it known:

    register(TaskFamily("ring", Ring))                                  # Ring(draw) is a Task
    register(OptimizerFamily("signum", "signum", rule=Signum(), exponents=(-5.0, -1.0)))
    register(ScheduleFamily("stairs", lambda share: 0.5 ** int(4 * share)))

``python -m clantune_scale.bench.schedules --problems generated --plugins MODULE`` imports the module that does so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from clantune_scale.bench.batched import OPTIMIZERS, RowOptimizer, Settings
from clantune_scale.bench.batched import register as register_rule
from clantune_scale.bench.schedules import curves
from clantune_scale.bench.schedules.families.draw import Draw
from clantune_scale.bench.schedules.families.task import Task
from clantune_scale.core.spelling import did_you_mean
from clantune_scale.errors import ConfigError

Side = Literal["tuning", "reporting"]


@dataclass(frozen=True)
class TaskFamily:
    """Tasks of one kind.

    Attributes:
        name: of the family.
        draw: makes one of them; a pure function of what it draws.
        steps: lengths of runs, at least and at most.
        side: of the split, if it is not left to chance.
    """

    name: str
    draw: Callable[[Draw], Task]
    steps: tuple[int, int] = (300, 5000)
    side: Side | None = None


@dataclass(frozen=True)
class OptimizerFamily:
    """An optimizer with a range of settings.

    Attributes:
        name: of the family.
        optimizer: the batched update rule's name.
        exponents: decimal, of the lowest and the highest learning rate that the oracle may need.
        hyper: hyperparameters besides, fixed in the family.
        weight_decays: to draw from; a decay of 0 takes away the starts with a wrong one.
        momentum: the hyperparameter that starts with a wrong momentum set; None if there is none.
        rule: to be registered under ``optimizer``; None for one that is there.
        side: of the split, if it is not left to chance.
    """

    name: str
    optimizer: str
    exponents: tuple[float, float]
    hyper: Mapping[str, float] = field(default_factory=dict)
    weight_decays: tuple[float, ...] = (0.0,)
    momentum: str | None = None
    rule: RowOptimizer | None = None
    side: Side | None = None

    def settings(self, draw: Draw) -> Settings:
        """One user's, without a learning rate; one in four clips gradients."""
        clip = 1.0 if draw.chance(0.25) else 0.0
        return Settings(self.optimizer, weight_decay=draw.choice(self.weight_decays), hyper=self.hyper, clip=clip)


@dataclass(frozen=True)
class ScheduleFamily:
    """Learning-rate curves of one form.

    Attributes:
        name: of the family.
        curve: share of the run that is done, 0 to 1, to a factor from 0 to 1.
        warmups: shares of the run that a linear warm-up may take; the curve follows in what is left.
        floors: factors that the curve may end at; it is compressed to the rest.
        side: of the split, if it is not left to chance.
    """

    name: str
    curve: curves.Curve
    warmups: tuple[float, ...] = (0.0, 0.02, 0.05, 0.1, 0.2)
    floors: tuple[float, ...] = (0.0, 0.1)
    side: Side | None = None

    def curves(self) -> dict[str, curves.Curve]:
        """All of the family by the names that problems give."""
        return {
            self.variant(warmup, floor): curves.shaped(self.curve, warmup=warmup, floor=floor)
            for warmup in self.warmups
            for floor in self.floors
        }

    def variant(self, warmup: float, floor: float) -> str:
        """The name of the curve with that warm-up and that floor."""
        parts = [f"warm-up {100 * warmup:g} %"] if warmup else []
        parts += [f"to {100 * floor:g} %"] if floor else []
        # A name of its own even without either: the benchmark's own curves have other names or another form.
        return f"{self.name} ({', '.join(parts) or 'plain'})"

    def draw(self, draw: Draw) -> str:
        """The name of one of its curves."""
        return self.variant(draw.choice(self.warmups), draw.choice(self.floors))


Family = TaskFamily | OptimizerFamily | ScheduleFamily
_F = TypeVar("_F", TaskFamily, OptimizerFamily, ScheduleFamily)


class Registry(Generic[_F]):
    """Families of one kind by name.

    Args:
        kind: in messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._families: dict[str, _F] = {}

    def add(self, family: _F) -> None:
        """Makes a family known.

        Raises:
            ConfigError: if another one has its name.
        """
        if family.name in self._families:
            raise ConfigError(f"there is a family of {self.kind}s {family.name!r} already. Choose another name.")
        self._families[family.name] = family

    def __getitem__(self, name: str) -> _F:
        if name not in self._families:
            hint = did_you_mean(name, self._families) or f" Choose from: {', '.join(self._families)}."
            raise ConfigError(f"no family of {self.kind}s is called {name!r}.{hint}")
        return self._families[name]

    def __iter__(self) -> Iterator[_F]:
        return iter(self._families.values())


TASKS: Registry[TaskFamily] = Registry("task")
OPTIMIZER_FAMILIES: Registry[OptimizerFamily] = Registry("optimizer")
SCHEDULES: Registry[ScheduleFamily] = Registry("schedule")


def register(family: Family) -> None:
    """Makes a family known, with its update rule or its curves.

    Raises:
        ConfigError: if its name, its rule's or a curve's is taken, or there is no rule.
    """
    if isinstance(family, TaskFamily):
        TASKS.add(family)
    elif isinstance(family, OptimizerFamily):
        if family.rule is not None:
            register_rule(family.optimizer, family.rule)
        elif family.optimizer not in OPTIMIZERS:
            raise ConfigError(
                f"family {family.name!r} names the batched optimizer {family.optimizer!r}, which is not there. "
                f"Give its rule, or choose from: {', '.join(OPTIMIZERS)}."
            )
        OPTIMIZER_FAMILIES.add(family)
    else:
        SCHEDULES.add(family)
        for name, curve in family.curves().items():
            curves.register(name, curve)
