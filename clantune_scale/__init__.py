"""Clan Training: a population of model replicas that tunes its own schedules while it pretrains."""

from __future__ import annotations

import importlib
from typing import Any

from clantune_scale.config.schema import ClanConfig
from clantune_scale.errors import (
    ClanError,
    ConfigError,
    DivergenceError,
    EvaluationError,
    NoEffectWarning,
    TopologyError,
    TransferError,
)

__version__ = "0.1.0"
__all__ = [
    "ClanConfig",
    "ClanError",
    "ClanSchedule",
    "ClanScheduleLR",
    "ConfigError",
    "DivergenceError",
    "EvaluationError",
    "NoEffectWarning",
    "TopologyError",
    "TransferError",
    "attach",
    "attach_megatron",
    "initialize",
    "join",
]


# Imported when first used: DeepSpeed alone takes seconds, and who validates a config need not wait for it.
_LAZY = {
    "ClanSchedule": "clantune_scale.core.schedule",
    "ClanScheduleLR": "clantune_scale.results.replay",
    "attach": "clantune_scale.backends.torch.attach",
    "attach_megatron": "clantune_scale.backends.megatron.attach",
    "initialize": "clantune_scale.backends.deepspeed.attach",
    "join": "clantune_scale.distributed.join",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
