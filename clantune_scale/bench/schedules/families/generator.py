"""Draws scheduling problems from the families: each is a pure function of the seed of the draw and its place in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clantune_scale.bench.batched import Settings
from clantune_scale.bench.batched.model import Knobs, Tensors
from clantune_scale.bench.schedules.families import optimizers, schedules, tasks
from clantune_scale.bench.schedules.families.draw import Draw, digest
from clantune_scale.bench.schedules.families.registry import (
    OPTIMIZER_FAMILIES,
    SCHEDULES,
    TASKS,
    OptimizerFamily,
    Registry,
    Side,
    TaskFamily,
)
from clantune_scale.bench.schedules.families.split import names_on, side_of
from clantune_scale.bench.schedules.families.task import Task
from clantune_scale.bench.schedules.problem import Grid, Problem, Start
from clantune_scale.errors import ConfigError

#: Importing these registers the families that come with the benchmark.
BUILT_IN = (tasks, optimizers, schedules)
#: Above 1, so that short runs are more frequent than in a draw that is uniform in the logarithm of their length.
SHORT = 1.7
#: How often nobody says how long the run will be.
UNKNOWN_LENGTH = 0.15
#: Wild starts: one rate from each range, in best constant rates.
WILD = ((0.01, 0.1), (0.1, 0.4), (0.4, 2.0), (2.0, 10.0))
#: Peaks of tuned starts, in best peaks of the problem's own schedule.
TUNED = (0.5, 1.0, 2.0)
#: The oracle's curves besides the problem's own, and its rates around the best constant one, in quarter decades.
CURVES, REACH = ("constant", "cosine", "linear", "warmup-linear"), (3, 5)
#: Times the configured weight decay that the oracle tries.
DECAYS = (0.0, 1.0, 8.0)


@dataclass(frozen=True)
class Families:
    """The families of one side that are drawn from.

    Attributes:
        side: of the split.
        tasks, optimizers, schedules: names.
    """

    side: Side
    tasks: Sequence[str]
    optimizers: Sequence[str]
    schedules: Sequence[str]

    @classmethod
    def of(
        cls,
        *,
        report: bool,
        tasks: Sequence[str] = (),
        optimizers: Sequence[str] = (),
        schedules: Sequence[str] = (),
    ) -> Families:
        """All of one side, or those of the given names.

        Args:
            report: whether to draw from the reporting side.
            tasks, optimizers, schedules: names; empty for all of that side.

        Raises:
            ConfigError: for an unknown name, or one of the other side.
        """
        side: Side = "reporting" if report else "tuning"
        wanted = ((TASKS, tasks), (OPTIMIZER_FAMILIES, optimizers), (SCHEDULES, schedules))
        return cls(side, *(_allowed(registry, names, side) for registry, names in wanted))


def _allowed(registry: Registry, names: Sequence[str], side: Side) -> list[str]:
    for name in names:
        if (found := side_of(registry.kind, registry[name])) != side:
            remedy = "Add --report, if this is a report" if found == "reporting" else "Leave --report away"
            raise ConfigError(
                f"the family of {registry.kind}s {name!r} is on the {found} side of the split, and this draw is for "
                f"{side}. {remedy}, or choose from: {', '.join(names_on(side, registry))}."
            )
    return list(names) or names_on(side, registry)


class GeneratedProblem(Problem):
    """A drawn task with a drawn optimizer, base schedule and length.

    Args:
        name: in tables.
        task: the model and its data.
        settings: what the user configured, but for the learning rate.
        schedule: the user's own curve.
        total_steps: of a run.
        grid: the oracle's.
        starts: of its runs.
        knows_length: whether strategies are told ``total_steps``.
        is_reporting: whether it is only for reports.
    """

    def __init__(
        self,
        name: str,
        task: Task,
        settings: Settings,
        schedule: str,
        total_steps: int,
        *,
        grid: Grid,
        starts: Sequence[Start],
        knows_length: bool,
        is_reporting: bool,
    ) -> None:
        self.name, self.settings, self.schedule, self.total_steps = name, settings, schedule, total_steps
        self.grid, self.starts, self.knows_length, self.is_reporting = grid, starts, knows_length, is_reporting
        self.batch_size, self.num_samples = task.batch_size, task.num_samples
        self.validation, self.test = task.validation, task.test
        self._task = task

    def init(self, seed: int) -> Tensors:
        return self._task.init(seed)

    def batch(self, seed: int, step: int, part: int) -> Tensors:
        return self._task.batch(seed, step, part)

    def losses(self, parameters: Tensors, batch: Tensors, knobs: Knobs) -> torch.Tensor:
        return self._task.losses(parameters, batch, knobs)


def draw_problems(families: Families, *, count: int, seed: int) -> list[Problem]:
    """The first ``count`` problems of a draw."""
    return [draw_problem(families, seed=seed, index=index) for index in range(count)]


def draw_problem(families: Families, *, seed: int, index: int) -> Problem:
    """Problem ``index`` of a draw.

    Families take turns: none comes twice before all others of its kind have come once.

    Args:
        families: to draw from.
        seed: of the draw.
        index: of the problem, from 0.
    """
    task_family = TASKS[_turn(families.tasks, "task", seed, index)]
    optimizer = OPTIMIZER_FAMILIES[_turn(families.optimizers, "optimizer", seed, index)]
    schedule_family = SCHEDULES[_turn(families.schedules, "schedule", seed, index)]
    draw = Draw("problem", families.side, seed, index)
    schedule = schedule_family.draw(draw.child("schedule"))
    total_steps = _length(task_family, draw.child("length"))
    knows_length = not draw.child("unknown length").chance(UNKNOWN_LENGTH)
    settings = optimizer.settings(draw.child("optimizer"))
    said = f"{total_steps} steps" if knows_length else f"{total_steps} steps, unknown length"
    return GeneratedProblem(
        f"{families.side} {seed}/{index}: {task_family.name}; {optimizer.name}; {schedule}; {said}",
        task_family.draw(draw.child("task", task_family.name)),
        settings,
        schedule,
        total_steps,
        grid=_grid(optimizer, settings, schedule),
        starts=_starts(optimizer, settings, draw.child("starts")),
        knows_length=knows_length,
        is_reporting=families.side == "reporting",
    )


def _turn(names: Sequence[str], kind: str, seed: int, index: int) -> str:
    """The family whose turn it is; another family that is registered takes a turn of its own and moves no other's
    order."""
    turn, place = divmod(index, len(names))
    return sorted(names, key=lambda name: digest("turn", kind, seed, turn, name))[place]


def _length(family: TaskFamily, draw: Draw) -> int:
    shortest, longest = family.steps
    return round(draw.log_uniform(shortest, longest, power=SHORT) / 10) * 10


def _grid(optimizer: OptimizerFamily, settings: Settings, schedule: str) -> Grid:
    low, high = optimizer.exponents
    rates = tuple(10 ** (low + 0.25 * step) for step in range(round(4 * (high - low)) + 1))
    decay = settings.weight_decay
    decays = tuple(times * decay for times in DECAYS) if decay else (0.0,)
    return Grid(rates, tuple(dict.fromkeys((*CURVES, schedule))), decays, reach=REACH)


def _starts(optimizer: OptimizerFamily, settings: Settings, draw: Draw) -> tuple[Start, ...]:
    wild = [draw.log_uniform(*bounds) for bounds in WILD]
    starts = [Start(f"{rate:.2g}x", rate) for rate in wild]
    starts += [Start(f"tuned {rate:g}x", rate, anchor="tuned", kind="tuned") for rate in TUNED]
    starts.append(Start("oracle", anchor="oracle", kind="oracle"))
    if settings.weight_decay:
        times = draw.choice((0.0, 30.0))
        changes: dict[str, object] = {"weight_decay": times * settings.weight_decay}
        starts.append(Start(f"decay {times:g}x", 1.0, changes, anchor="tuned", kind="wrong decay"))
    if optimizer.momentum is not None:
        value, rate = draw.choice(((0.5, 1.0), (0.98, 0.32)))
        changes = {"hyper": {**settings.hyper, optimizer.momentum: value}}
        starts.append(Start(f"{optimizer.momentum} {value:g}", rate, changes, anchor="tuned", kind="wrong momentum"))
    return tuple(starts)
