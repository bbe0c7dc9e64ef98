"""The clan's common value of a gene that is not expressed; all members train with it while they cooperate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.rounds import PhaseKind


def consensus_value(values: Sequence[float], gene: Gene) -> float:
    """Mean or median of the members' values in the gene's scale, rounded and clipped to its domain.

    Values that are all equal are returned untouched: encoding and decoding would cost the last bit,
    and a clan of equal members must train exactly as one of them.
    """
    if len(set(values)) == 1:
        return gene.expressed(values[0])
    encoded = [gene.encode(value) for value in values]
    centre = math.fsum(encoded) / len(encoded) if gene.consensus == "mean" else statistics.median(encoded)
    return gene.expressed(gene.decode(centre))


def consensus(genomes: Sequence[Genome], genes: Sequence[Gene]) -> dict[str, float]:
    """Every gene's consensus over the clan, by name.

    Args:
        genomes: one per member; the order does not change the result.
        genes: the genes to agree on.
    """
    return {gene.name: consensus_value([genome.values[gene.name] for genome in genomes], gene) for gene in genes}


def values_in_effect(genomes: Sequence[Genome], genes: Sequence[Gene], kind: PhaseKind) -> list[dict[str, float]]:
    """[members] by gene name: each member's own values, and in cooperation the clan's of specialized genes.

    Args:
        genomes: one per member.
        genes: all of the clan's.
        kind: of the phase.
    """
    shared = {}
    if kind is PhaseKind.COOPERATIVE:
        shared = consensus(genomes, [gene for gene in genes if gene.kind == "specialized"])
    return [dict(genome.values) | shared for genome in genomes]
