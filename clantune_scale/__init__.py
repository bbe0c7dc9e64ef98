"""Clan Training: a population of model replicas that tunes its own schedules while it pretrains.

Messages go to ``logging.getLogger("clantune_scale")`` and the loggers below it; all of them are warnings or errors. The
package adds no handler. Python prints warnings of a logger without handlers to standard error, so that a user who
configures nothing sees them. A handler on that logger, or on the root, routes them; a level above ``CRITICAL`` silences
them. The table of rounds and the lines of steps are not messages: they go to standard output.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clantune_scale.config.schema import ClanConfig
from clantune_scale.core.extras import is_installed, missing
from clantune_scale.errors import (
    CheckpointError,
    ClanError,
    ConfigError,
    DivergenceError,
    EvaluationError,
    MembersLostError,
    NoEffectWarning,
    RecordingStopped,
    TopologyError,
    TransferError,
)

if TYPE_CHECKING:
    from clantune_scale.backends.deepspeed.attach import initialize
    from clantune_scale.backends.join import join
    from clantune_scale.backends.megatron.attach import attach_megatron
    from clantune_scale.backends.torch.attach import attach
    from clantune_scale.config.deepspeed_file import load_config
    from clantune_scale.core.schedule import ClanSchedule
    from clantune_scale.results.champion import Summary
    from clantune_scale.results.replay import ClanScheduleLR

__version__ = "0.1.0"
__all__ = [
    "CheckpointError",
    "ClanConfig",
    "ClanError",
    "ClanSchedule",
    "ClanScheduleLR",
    "ConfigError",
    "DivergenceError",
    "EvaluationError",
    "MembersLostError",
    "NoEffectWarning",
    "RecordingStopped",
    "Summary",
    "TopologyError",
    "TransferError",
    "attach",
    "attach_megatron",
    "initialize",
    "join",
    "load_config",
]


# Imported at the first use: DeepSpeed takes seconds, and a script that validates a config need not wait for it.
_LAZY = {
    "ClanSchedule": "clantune_scale.core.schedule",
    "ClanScheduleLR": "clantune_scale.results.replay",
    "Summary": "clantune_scale.results.champion",
    "attach": "clantune_scale.backends.torch.attach",
    "attach_megatron": "clantune_scale.backends.megatron.attach",
    "initialize": "clantune_scale.backends.deepspeed.attach",
    "join": "clantune_scale.backends.join",
    "load_config": "clantune_scale.config.deepspeed_file",
}
# What an extra's package is needed for. Without it the name can still be imported, also by ``import *``.
_NEEDS = {"attach_megatron": "megatron.core", "initialize": "deepspeed"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _NEEDS and not is_installed(_NEEDS[name]):
        return _refusal(name)
    return getattr(importlib.import_module(_LAZY[name]), name)


def _refusal(name: str) -> Callable[..., Any]:
    """Stands for a function whose engine is not installed: calling it raises the error that names the extra."""

    def refuse(*_args: Any, **_keywords: Any) -> Any:
        raise missing(_NEEDS[name], needed_by=f"clantune_scale.{name}()")

    return refuse


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
