"""The families of schedules that come with the benchmark."""

from __future__ import annotations

import math

from clantune_scale.bench.schedules import curves
from clantune_scale.bench.schedules.families.registry import ScheduleFamily, register

#: Warm-ups of curves that have an end but no need of one.
_ANY = (0.0, 0.02, 0.05, 0.1, 0.2)
_CYCLES = 3


def steps(share: float) -> float:
    """A tenth at half of the run, and a hundredth at three quarters (He et al. 2015)."""
    return 1.0 if share < 0.5 else 0.1 if share < 0.75 else 0.01


def halvings(share: float) -> float:
    """Half as much after every fifth of the run."""
    return 0.5 ** min(4, int(5 * share))


def restarts(share: float) -> float:
    """Cosine decay that starts anew twice (Loshchilov and Hutter 2016)."""
    return curves.cosine((_CYCLES * share) % 1.0 if share < 1.0 else 1.0)


def square_root_cooldown(share: float) -> float:
    """Constant, then 1 minus the square root over the last 30 % (Hägele et al. 2024)."""
    return 1.0 if share < 0.7 else 1.0 - math.sqrt((share - 0.7) / 0.3)


def one_cycle(share: float) -> float:
    """Up over the first 30 %, down over the rest (Smith and Topin 2017)."""
    return share / 0.3 if share < 0.3 else (1.0 - share) / 0.7


def inverse_square_root(share: float) -> float:
    """Falls to a fifth, with the square root of the steps."""
    return 1.0 / math.sqrt(1.0 + 24.0 * share)


for _family in (
    ScheduleFamily("constant", lambda share: 1.0, floors=(0.0,)),
    ScheduleFamily("cosine", curves.cosine),
    ScheduleFamily("linear", curves.linear),
    ScheduleFamily("wsd", curves.wsd),
    ScheduleFamily("wsd-sqrt", square_root_cooldown),
    ScheduleFamily("inverse-sqrt", inverse_square_root, warmups=(0.02, 0.05, 0.1), floors=(0.0,)),
    ScheduleFamily("steps", steps, warmups=(0.0, 0.05), floors=(0.0,)),
    ScheduleFamily("halvings", halvings, warmups=(0.0, 0.05), floors=(0.0,)),
    ScheduleFamily("restarts", restarts, warmups=(0.0, 0.05)),
    ScheduleFamily("polynomial", lambda share: (1.0 - share) ** 2, warmups=_ANY),
    ScheduleFamily("exponential", lambda share: 0.01**share, warmups=_ANY, floors=(0.0,)),
    ScheduleFamily("one-cycle", one_cycle, warmups=(0.0,)),
):
    register(_family)
