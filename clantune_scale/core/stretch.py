"""Adapts a schedule to a run with another number of steps or another batch, by rules that the user names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, get_args

from clantune_scale.core.schedule import ClanSchedule, Segment
from clantune_scale.errors import ConfigError

RateRule = Literal["none", "sqrt", "linear"]

_POWERS: dict[str, float] = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}


def rate_factor(rule: RateRule, *, old_batch: int, new_batch: int) -> float:
    """What learning rates are multiplied by when the batch changes.

    Args:
        rule: ``"linear"`` in the batch (Goyal et al. 2017, for SGD), ``"sqrt"`` (Malladi et al. 2022, for Adam
            and its variants), or ``"none"``.
        old_batch: samples per step of the run that found the schedule.
        new_batch: samples per step of the run that replays it.

    Raises:
        ConfigError: for another rule, or a batch that is no positive number.
    """
    if rule not in _POWERS:
        raise ConfigError(f"the learning-rate rule is {rule!r}. Choose from: {', '.join(get_args(RateRule))}.")
    if old_batch < 1 or new_batch < 1:
        raise ConfigError(f"the batch goes from {old_batch} to {new_batch} samples. Give at least 1.")
    return float((new_batch / old_batch) ** _POWERS[rule])


def stretched(schedule: ClanSchedule, *, num_steps: int | None = None, factor: float = 1.0) -> ClanSchedule:
    """The schedule over ``num_steps``, its learning rates times ``factor``.

    The step axis is scaled linearly: a boundary at a share of the old run lies at the same share of the new
    one, rounded to a whole step. A segment that becomes shorter than half a step may vanish. Momentum and
    betas are not changed, although their time scales are in steps, too.

    Args:
        schedule: as it was found.
        num_steps: steps of the new run; as many as the old one's if None.
        factor: on every learning rate (see :func:`rate_factor`).

    Raises:
        ConfigError: if ``num_steps`` is below 1.
    """
    if num_steps is not None and num_steps < 1:
        raise ConfigError(f"the schedule is to be stretched to {num_steps} steps. Give at least 1.")
    scale = 1.0 if num_steps is None else num_steps / schedule.num_steps
    segments = tuple(_segments(schedule, scale))
    return replace(schedule, segments=segments, rate_factor=schedule.rate_factor * factor)


def _segments(schedule: ClanSchedule, scale: float) -> Iterator[Segment]:
    for segment in schedule.segments:
        start, end = round(segment.start_step * scale), round(segment.end_step * scale)
        if end > start:
            yield replace(segment, start_step=start, end_step=end)
