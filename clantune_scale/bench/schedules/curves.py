"""Learning-rate schedules by name: the factor on the base rate over a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from clantune_scale.bench.batched.model import constant
from clantune_scale.errors import ConfigError

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


def shaped(curve: Curve, *, warmup: float = 0.0, floor: float = 0.0) -> Curve:
    """``curve`` between ``floor`` and 1, after a linear warm-up that takes the first part of the run."""

    def factor(share: float) -> float:
        if share < warmup:
            return share / warmup
        rest = min(1.0, (share - warmup) / (1 - warmup))
        return floor + (1 - floor) * curve(rest)

    return factor


def register(name: str, curve: Curve) -> None:
    """Makes a curve known under a name.

    Raises:
        ConfigError: if another one has that name.
    """
    if name in CURVES:
        raise ConfigError(f"there is a learning-rate curve {name!r} already. Choose another name.")
    CURVES[name] = curve


def over(name: str, total_steps: int) -> Callable[[int], float]:
    """The curve called ``name`` as a function of the steps done, in a run of ``total_steps``."""
    if name == "constant":
        return constant
    curve = CURVES[name]
    return lambda step: curve(step / total_steps)
