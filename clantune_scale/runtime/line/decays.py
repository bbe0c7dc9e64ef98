"""How an optimizer applies its weight decay, read off its type and its parameter groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from clantune_scale.config.default_genes import ADAMW, update_rule
from clantune_scale.core.line import DecayRule

_DECOUPLED = ("AdamW", "Lion", "Muon")


def decay_rule(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> DecayRule | None:
    """The rule of one of the optimizer's groups; None if it is not known to be linear in the decay.

    Adam divides a decay that it takes in with the gradient by a root of its own square, so no linear rule holds.
    """
    is_decoupled = group.get("decoupled_weight_decay") or type(optimizer).__name__.endswith(_DECOUPLED)
    if is_decoupled or update_rule(optimizer) == ADAMW:
        return DecayRule()
    if isinstance(optimizer, torch.optim.SGD):
        return DecayRule(float(group["momentum"]), float(group["dampening"]), bool(group["nesterov"]))
    return None
