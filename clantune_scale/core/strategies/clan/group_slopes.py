"""The moves of many groups' learning rates from the validation gradient at two members' points.

Members vary all groups' rates together, along one direction. At a point of it, one backward pass over the validation
window gives the slope of every group g by itself: the gradient's product with how far the round has moved that group,

    s_g = dL / dlog k_g = < dL/dE_g, E_g - A_g >,    A_g: where the average would be had the weights not moved

Two points along the direction give the curvature of each group as the change of its slope: what a Hessian-vector
product would give, sum_h d2L / dlog k_g dlog k_h, but without a second derivative, which fused attention and sharded
engines do not have. It holds the group's own curvature and its coupling with the others. If coupling slows (groups
that do the same work), it is more than the group's own, and the move is too short rather than too long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.strategies.clan.lr_trial import is_trial_gene
from clantune_scale.core.strategies.clan.parabola import Move, move_of
from clantune_scale.errors import ConfigError


def sloped_genes(genes: Sequence[Gene]) -> list[Gene]:
    """The learning rates that move by slopes: those of parameter groups.

    Raises:
        ConfigError: if there are fewer than two of them, or two of them write the same group.
    """
    rates = [gene for gene in genes if is_trial_gene(gene)]
    names = [group for gene in rates for group in gene.groups or ()]
    if len(rates) < 2 or any(gene.groups is None for gene in rates) or len(set(names)) < len(names):
        have = ", ".join(f"{gene.name} ({', '.join(gene.groups or ['all groups'])})" for gene in rates) or "none"
        raise ConfigError(
            "the option group_slopes moves the learning rates of parameter groups, and needs two genes or more on a "
            f"log scale, each for groups of its own; there are: {have}. Name them in `genes`, as "
            '"lr:head": {"groups": ["head"]}, or leave the option out.'
        )
    return rates


def slope_moves(
    genes: Sequence[Gene],
    genomes: Sequence[Genome],
    centre: Mapping[str, float],
    fitness: Fitness,
    *,
    caution: float,
) -> dict[str, Move]:
    """The move of each gene.

    Args:
        genes: whose slopes were measured.
        genomes: [members].
        centre: by gene, in scale units.
        fitness: of the round, with slopes.
        caution: standard errors over the batches, as for the parabola.
    """
    assert fitness.slopes is not None, "the round's plan names slopes, and none were measured"
    moves = {}
    for gene in genes:
        low, high = (
            gene.encode(genomes[member].values[gene.name]) - centre[gene.name] for member in fitness.slopes.members
        )
        at_low, at_high = fitness.slopes.by_gene[gene.name]
        if abs(high - low) < 1e-9:
            moves[gene.name] = Move(0.0, "no decision: members did not differ")
        elif not (np.isfinite(at_low).all() and np.isfinite(at_high).all()):
            moves[gene.name] = Move(0.0, "no decision: a slope is not finite")
        else:
            slopes = (at_low * high - at_high * low) / (high - low)
            curvatures = (at_high - at_low) / (high - low) / 2
            moves[gene.name] = move_of(slopes.tolist(), curvatures.tolist(), gene.max_change, caution=caution)
    return moves
