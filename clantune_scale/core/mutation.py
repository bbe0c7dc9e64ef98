"""Random draws that are equal on every rank, and self-adaptive mutation with them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from clantune_scale.core.genome import Gene, Genome

#: The member index of a draw for the whole clan.
CLAN = -1

_STANDARD_NORMAL = NormalDist()


def _bits(seed: int, round_: int, member: int, name: str, count: int) -> np.ndarray:
    """[count] uint64 random words of the stream keyed by (seed, round, member, name).

    The words are raw Philox output. Numpy keeps it fixed between versions, but not a ``Generator``'s
    distributions (NEP 19). Round and member may be -1 (before the first round, the whole clan).
    """
    purpose = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    key = np.random.SeedSequence((seed % 2**64, round_ + 1, member + 1, purpose))
    return np.random.Philox(key).random_raw(count)


def uniforms(seed: int, round_: int, member: int, name: str, *, count: int) -> np.ndarray:
    """[count] float64 strictly between 0 and 1, the same on any rank and in any order of calls.

    Args:
        seed: the run's.
        round_: round index; -1 for draws before the first round.
        member: member index, or :data:`CLAN`.
        name: the gene or the purpose of the draw; different names give independent streams.
        count: how many.
    """
    return ((_bits(seed, round_, member, name, count) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def uniform(seed: int, round_: int, member: int, name: str) -> float:
    """One uniform number strictly between 0 and 1; see :func:`uniforms`."""
    return float(uniforms(seed, round_, member, name, count=1)[0])


def normal(seed: int, round_: int, member: int, name: str) -> float:
    """One standard normal number, by inversion of :func:`uniform`."""
    return _STANDARD_NORMAL.inv_cdf(uniform(seed, round_, member, name))


def permutation(seed: int, round_: int, member: int, name: str, *, count: int) -> tuple[int, ...]:
    """The numbers 0 to ``count`` - 1 in a random order."""
    return tuple(int(i) for i in np.argsort(uniforms(seed, round_, member, name, count=count), kind="stable"))


def mutate(
    genome: Genome,
    genes: Sequence[Gene],
    *,
    seed: int,
    round_: int,
    member: int,
    tau: float = 0.3,
    min_step: float = 0.1,
    max_step: float = 10.0,
) -> Genome:
    """A mutated copy: each step size first, then the value, by a draw with the *new* step size.

    Step sizes vary log-normally (Schwefel's self-adaptation, s' = s exp(tau N)), values normally in
    the gene's own scale (x' = x + s' N). The change is capped at ``gene.max_change`` and the result
    reflected at the bounds, so that no value piles up on them.

    Args:
        genome: the parent's; left as it is.
        genes: the genes to mutate; others are inherited.
        seed: the run's; with round, member and gene name it fixes every draw.
        round_: round index, -1 for the first population.
        member: index of the member that will carry the result.
        tau: standard deviation of the logarithm of a step size's change.
        min_step: smallest step size, in multiples of the gene's own initial one.
        max_step: largest step size, likewise.
    """
    values, step_sizes = dict(genome.values), dict(genome.step_sizes)
    for gene in genes:
        factor = math.exp(tau * normal(seed, round_, member, f"step:{gene.name}"))
        step = genome.step_sizes.get(gene.name, gene.step_size) * factor
        step = min(max(step, min_step * gene.step_size), max_step * gene.step_size)
        change = step * normal(seed, round_, member, f"value:{gene.name}")
        change = min(max(change, -gene.max_change), gene.max_change)
        step_sizes[gene.name] = step
        values[gene.name] = gene.decode(gene.reflect(gene.encode(genome.values[gene.name]) + change))
    return Genome(values, step_sizes)
