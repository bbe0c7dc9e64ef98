"""Learning-rate schedules by name: the factor on the base rate over a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from clantune_scale.bench.batched.model import constant

#: (share of the run that is done, 0 to 1) -> factor
Curve = Callable[[float], float]

WARMUP = 0.05


def cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


def linear(share: float) -> float:
    return 1 - share


def wsd(share: float) -> float:
    """Warm up, stay, decay over the last fifth (MiniCPM's schedule)."""
    return min(1.0, (1 - share) / 0.2)


def inverse_square_root(share: float) -> float:
    """The transformer's curve: 1 at the end of the warm-up, which it needs."""
    return math.sqrt(WARMUP / max(share, WARMUP))


def warmed_up(curve: Curve, share: float) -> float:
    """``curve`` after a linear warm-up, which takes the first part of the run."""
    if share < WARMUP:
        return share / WARMUP
    return curve((share - WARMUP) / (1 - WARMUP))


CURVES: dict[str, Curve] = {
    "constant": lambda share: 1.0,
    "cosine": cosine,
    "linear": linear,
    "warmup-linear": partial(warmed_up, linear),
    "warmup-cosine": partial(warmed_up, cosine),
    "wsd": partial(warmed_up, wsd),
    "inverse-sqrt": lambda share: min(share / WARMUP, inverse_square_root(share)),
}


def over(name: str, total_steps: int) -> Callable[[int], float]:
    """The curve called ``name`` as a function of the steps done, in a run of ``total_steps``."""
    if name == "constant":
        return constant
    curve = CURVES[name]
    return lambda step: curve(step / total_steps)
