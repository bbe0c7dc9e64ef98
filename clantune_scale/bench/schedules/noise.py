"""How much of a score is chance over seeds, by one rule for all methods and starts.

Seeds are shared: run s of a method, of its start's default and of the oracle saw the same weights and data. So
differences are taken seed by seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

#: Standard errors over seeds that count as more than noise.
ERRORS = 2.0


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; nan for a single value, or if one is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values))


def has_room(default: Sequence[float], oracle: Sequence[float]) -> bool:
    """Whether the oracle is better than the default by more than noise.

    Otherwise S1 is a ratio of two noises, and a method can only be asked to do no harm.

    Args:
        default: [seeds] test losses of the start kept as it is.
        oracle: [seeds] of the oracle.
    """
    room = [before - best for before, best in zip(default, oracle, strict=True)]
    mean = statistics.fmean(room)
    return mean > 0 and not mean <= ERRORS * standard_error(room)


def s1_error(losses: Sequence[float], default: Sequence[float], oracle: Sequence[float]) -> float:
    """Standard error of S1, a ratio of means, over seeds (first order); nan if it has none.

    Args:
        losses: [seeds] of the method.
        default: [seeds] of the start kept as it is.
        oracle: [seeds].
    """
    room = statistics.fmean(default) - statistics.fmean(oracle)
    if not math.isfinite(room) or room == 0:
        return math.nan
    s1 = (statistics.fmean(default) - statistics.fmean(losses)) / room
    rest = [d - loss - s1 * (d - best) for loss, d, best in zip(losses, default, oracle, strict=True)]
    return standard_error(rest) / abs(room)


def is_worse(losses: Sequence[float], default: Sequence[float]) -> bool:
    """Whether a method's losses ([seeds]) lie above the default's by more than noise, seed by seed."""
    excess = [loss - before for loss, before in zip(losses, default, strict=True)]
    mean = statistics.fmean(excess)
    return mean > 0 and not mean <= ERRORS * standard_error(excess)
