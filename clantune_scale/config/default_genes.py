"""The genes of a run whose config names none: a policy over facts of the run, apart from the config's schema."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from clantune_scale.config.schema import ClanConfig, GeneConfig

_TORCH_KEY = "decoupled_weight_decay"
#: The update rule that :func:`update_rule` calls so: Adam's step, and a weight decay apart from it (Loshchilov and
#: Hutter 2019).
ADAMW = "adamw"


def default_genes(
    strategy: str, *, sees_samples_once: bool, optimizer: str, weight_decays: Iterable[float]
) -> tuple[str, ...]:
    """The genes of a run whose user names none.

    Weight decay is tuned if a round can show its effect. If data are seen repeatedly, it is a regularizer, and its
    effect shows long after the round that decides. If every sample is new, it is a part of AdamW's dynamics: it should
    not grow with a rate that is raised, and a decision to lower it can be trusted (the schedule benchmark's log, 13).
    Other optimizers have other dynamics. Lion, whose steps all have the same length, is harmed.

    Args:
        strategy: its name. For other strategies than ``clan`` nothing was measured.
        sees_samples_once: whether the run is known to see no training sample twice.
        optimizer: its update rule, from :func:`update_rule`.
        weight_decays: of all parameter groups; a gene that multiplies 0 sets nothing.
    """
    acts = optimizer == ADAMW and any(decay > 0 for decay in weight_decays)
    return ("lr", "weight_decay") if strategy == "clan" and sees_samples_once and acts else ("lr",)


def genes_of(
    config: ClanConfig, *, sees_samples_once: bool, optimizer: str, weight_decays: Iterable[float]
) -> dict[str, GeneConfig]:
    """The genes that a block names, or the default ones. Other arguments are as for :func:`default_genes`."""
    if "genes" in config.model_fields_set:
        return config.genes
    names = default_genes(
        config.strategy.name,
        sees_samples_once=sees_samples_once,
        optimizer=optimizer,
        weight_decays=weight_decays,
    )
    return {name: GeneConfig() for name in names}


def update_rule(optimizer: Any) -> str:
    """``ADAMW`` for an optimizer that updates as AdamW does, whoever made it; for others the class in lower case.

    Fused kernels (Apex, DeepSpeed, Transformer Engine) say it in ``adam_w_mode``, and torch in each group's
    ``decoupled_weight_decay``. If neither is there, the name of the class or of a base decides.
    """
    kinds = [kind.__name__.lower() for kind in type(optimizer).__mro__]
    if not any("adam" in kind for kind in kinds):
        return kinds[0]
    is_decoupled = getattr(optimizer, "adam_w_mode", None)
    if is_decoupled is None:
        groups = getattr(optimizer, "param_groups", [])
        is_decoupled = next((group[_TORCH_KEY] for group in groups if _TORCH_KEY in group), None)
    if is_decoupled is None:
        is_decoupled = any(ADAMW in kind for kind in kinds)
    return ADAMW if is_decoupled else kinds[0].replace(ADAMW, "adam")
