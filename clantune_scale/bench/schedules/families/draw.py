"""Random choices that are a pure function of words: the same on every machine and Python."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from typing import TypeVar

_T = TypeVar("_T")


def digest(*words: object) -> int:
    """A whole number of 64 bits that depends on the words only."""
    text = "/".join(map(str, words))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class Draw:
    """A stream of choices.

    Args:
        words: what it depends on.
    """

    def __init__(self, *words: object) -> None:
        self._words = words
        # Of all its methods only random() is promised to stay what it is from one Python to the next.
        self._random = random.Random(digest(*words)).random

    def child(self, *words: object) -> Draw:
        """A stream of its own, whatever was drawn from this one before."""
        return Draw(*self._words, *words)

    def chance(self, probability: float) -> bool:
        """True as often as ``probability`` says."""
        return self._random() < probability

    def choice(self, options: Sequence[_T]) -> _T:
        """One of ``options``."""
        return options[int(self._random() * len(options))]

    def uniform(self, low: float, high: float, *, power: float = 1.0) -> float:
        """A number from ``low`` to ``high`` with three digits; a ``power`` above 1 favours low ones."""
        return float(f"{low + (high - low) * self._random() ** power:.3g}")

    def log_uniform(self, low: float, high: float, *, power: float = 1.0) -> float:
        """A number from ``low`` to ``high`` with three digits, uniform in its logarithm but for ``power``."""
        exponent = math.log(high / low) * self._random() ** power
        return float(f"{low * math.exp(exponent):.3g}")

    def whole(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``, both possible, uniform in its logarithm."""
        return min(high, int(low * math.exp(math.log((high + 1) / low) * self._random())))

    def key(self) -> int:
        """A seed for torch, below 2 ** 31."""
        return int(self._random() * 2**31)
