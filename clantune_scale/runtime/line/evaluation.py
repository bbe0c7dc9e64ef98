"""The losses of members on the line, and the slopes of their learning rates, at points written into the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.line import Line, slope_members, slopes_of
from clantune_scale.runtime.engine_protocol import Backend
from clantune_scale.runtime.genome_application import group_names
from clantune_scale.runtime.line.points import Points
from clantune_scale.runtime.measurement import Measurement


def at_points(
    line: Line,
    points: Points,
    measurement: Measurement,
    backend: Backend,
    *,
    genomes: Sequence[Genome],
    genes: Sequence[Gene],
    sloped: Sequence[str],
    averaged: bool,
) -> Fitness:
    """The members' losses on the common window (a member collective). Members at one point are measured once.

    Args:
        line: where members lie.
        points: of the round.
        measurement: of the model's losses.
        backend: the member's engine.
        genomes: [members].
        genes: all of the clan's.
        sloped: genes whose slopes are measured too, at two members' points.
        averaged: whether averages are measured.
    """
    ends = slope_members(genomes, sloped[0]) if sloped else None
    measured: dict[Any, np.ndarray] = {}
    tables: dict[int, np.ndarray] = {}
    try:
        with points.held() as write:
            for member, point in enumerate(line.points):
                is_end = ends is not None and member in ends
                if point in measured and not is_end:
                    continue
                write(member, averaged)
                backend.refresh()
                measured[point] = measurement.losses()
                if is_end:
                    tables[member] = measurement.slopes(partial(points.slopes, member))
    finally:
        backend.refresh()
    fitness = Fitness.from_losses(np.stack([measured[point] for point in line.points]))
    if ends is None:
        return fitness
    groups = group_names(backend.param_groups())
    return replace(fitness, slopes=slopes_of(ends, [tables[member] for member in ends], sloped, genes, groups))
