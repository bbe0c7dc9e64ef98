"""Multiplying a gene by a factor, whatever its scale."""

from __future__ import annotations

import math

from clantune_scale.core.genome import Gene


def times(gene: Gene, value: float, factor: float) -> float:
    """``factor`` times ``value``, in scale units and not yet inside the bounds.

    If the scale is logit, the odds are multiplied. 1.2 times a momentum of 0.9 is above 1. 1.2 times its odds of 9 is a
    momentum of 0.915.

    Args:
        gene: whose scale it is.
        value: not encoded.
        factor: above 0.
    """
    return value * factor if gene.scale == "linear" else gene.encode(value) + math.log(factor)


def ratio(gene: Gene, value: float, reference: float) -> float:
    """The factor from ``reference`` to ``value``; between their odds if the scale is logit."""
    return value / reference if gene.scale == "linear" else math.exp(gene.encode(value) - gene.encode(reference))
