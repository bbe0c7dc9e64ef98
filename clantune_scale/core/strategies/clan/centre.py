"""Where the centre of ``clan`` goes: within bounds, and weight decay with the learning rate that multiplies it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from clantune_scale.core.genome import Gene
from clantune_scale.core.strategies.clan.lr_trial import is_trial_gene


def moved(centre: Mapping[str, float], changes: Mapping[str, float], genes: Sequence[Gene]) -> dict[str, float]:
    """The centre after ``changes``.

    An optimizer shrinks weights by learning rate times weight decay in a step. A learning rate that rises twentyfold
    would shrink them twenty times as fast. Nobody asked for that, so a weight decay moves against its learning rate.
    Its own move counts only downward. A round rewards weights that shrink, because they lose noise, just as it rewards
    a smaller learning rate. So a move to more decay says little, and a move to less can be believed.

    Args:
        centre: by gene, in scale units.
        changes: of the explored genes, likewise.
        genes: all.
    """
    after = dict(centre)
    for gene in genes:
        change = changes.get(gene.name, 0.0)
        if _decays(gene):
            rate = next((other.name for other in genes if is_trial_gene(other) and other.groups == gene.groups), "")
            change = min(change, 0.0) - changes.get(rate, 0.0)
        low, high = (gene.encode(bound) for bound in gene.bounds)
        after[gene.name] = min(max(centre[gene.name] + change, low), high)
    return after


def _decays(gene: Gene) -> bool:
    return gene.target == "weight_decay" and gene.scale == "log"
