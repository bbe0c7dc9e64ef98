"""The selection rules of ``classic``, as pure functions of fitness: who survives, and who is replaced by whom."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from clantune_scale.core import mutation
from clantune_scale.core.fitness import Fitness
from clantune_scale.errors import EvaluationError

#: (fitness, strength of selection, seed, round) -> donors, as in ``Decision.donors``.
Selection = Callable[[Fitness, float, int, int], tuple[int, ...]]


def survivors(fitness: Fitness, round_: int) -> list[int]:
    """The members that may survive and donate, fittest first: those whose losses are all finite.

    Raises:
        EvaluationError: if there is none.
    """
    finite = [member for member in fitness.ranking if fitness.is_finite[member]]
    if not finite:
        raise EvaluationError(
            f"round {round_}: none of the {fitness.num_members} members has a finite validation loss, so none can "
            f"survive. Lower the learning rate, or choose strategy 'clan', which can roll back to its last snapshot."
        )
    return finite


def truncation(fitness: Fitness, fraction: float, seed: int, round_: int) -> tuple[int, ...]:
    """The weakest ``fraction`` of the clan is replaced by random ones of the fittest ``fraction``.

    At least one member is replaced and at most half are, besides those that are not finite. A member
    that is as fit as its donor keeps its own state: there is nothing to gain from the copy.
    """
    size, mean = fitness.num_members, fitness.mean
    count = min(max(1, round(fraction * size)), size // 2)
    strong = survivors(fitness, round_)[: max(count, 1)]
    last = fitness.ranking[size - count :] if count else ()
    weak = [m for m in range(size) if m not in strong and (m in last or not fitness.is_finite[m])]
    donors = list(range(size))
    for member in weak:
        pick = strong[int(mutation.uniform(seed, round_, member, "truncation") * len(strong))]
        donors[member] = pick if mean[pick] < mean[member] else member
    return tuple(donors)


def tournament(fitness: Fitness, size: float, seed: int, round_: int) -> tuple[int, ...]:
    """Each member draws ``size`` - 1 random others, and takes the state of the fittest if that is fitter than itself.

    A donor that lost its own tournament passes on the state that it took, so every copied state is a survivor's.
    """
    mean, population = fitness.mean, fitness.num_members
    best = survivors(fitness, round_)[0]
    beaten_by = list(range(population))
    for member in range(population):
        draws = mutation.uniforms(seed, round_, member, "tournament", count=max(1, round(size) - 1))
        rivals = [int(draw * population) for draw in draws]
        winner = min([member, *rivals], key=lambda m: (mean[m], m != member, m))
        beaten_by[member] = winner if fitness.is_finite[winner] else best
    return tuple(root(member, beaten_by) for member in range(population))


def rank(fitness: Fitness, pressure: float, seed: int, round_: int) -> tuple[int, ...]:
    """Copies in proportion to a weight that falls linearly with rank (Baker 1985).

    Args:
        pressure: expected copies of the fittest, 1 (no selection) to 2.
    """
    order = survivors(fitness, round_)
    place = stats.rankdata(fitness.mean[order]) - 1  # ties share their average, and so their weight
    weights = np.zeros(fitness.num_members)
    weights[order] = pressure - 2.0 * (pressure - 1.0) * place / max(len(order) - 1, 1)
    return _resample(weights, order, mutation.uniform(seed, round_, mutation.CLAN, "rank"))


def boltzmann(fitness: Fitness, temperature: float, seed: int, round_: int) -> tuple[int, ...]:
    """Copies in proportion to exp(-(loss - best) / (temperature x standard deviation of the finite losses))."""
    order = survivors(fitness, round_)
    mean = fitness.mean
    spread = float(np.std(mean[order]))
    weights = np.zeros(fitness.num_members)
    for member in order:
        weights[member] = math.exp(-(mean[member] - mean[order[0]]) / (temperature * spread)) if spread > 0 else 1.0
    return _resample(weights, order, mutation.uniform(seed, round_, mutation.CLAN, "boltzmann"))


def root(member: int, beaten_by: Sequence[int]) -> int:
    """The member whose state ``member`` gets, at the end of a chain of copies."""
    while beaten_by[member] != member:
        member = beaten_by[member]
    return member


def _resample(weights: np.ndarray, order: list[int], u: float) -> tuple[int, ...]:
    """Systematic resampling (stochastic universal sampling, Baker 1987).

    A survivor keeps its place. Its further copies go to members without one, the weakest first.
    """
    size = len(weights)
    edges = np.cumsum(weights[order]) / weights.sum() * size
    edges[-1] = size
    copies = np.diff(np.searchsorted(np.arange(size) + u, edges), prepend=0)
    donors = list(range(size))
    kept = [member for member, count in zip(order, copies, strict=True) if count > 0]
    vacant = [member for member in range(size) if member not in order]
    vacant += [member for member in reversed(order) if member not in kept]
    surplus = [member for member, count in zip(order, copies, strict=True) for _ in range(count - 1)]
    for member, donor in zip(vacant, surplus, strict=True):
        donors[member] = donor
    return tuple(donors)


SELECTIONS: dict[str, Selection] = {
    "truncation": truncation,
    "tournament": tournament,
    "rank": rank,
    "boltzmann": boltzmann,
}
