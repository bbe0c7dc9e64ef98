"""Importing a peer's package, or saying how to get it."""

from __future__ import annotations

import importlib
from types import ModuleType

from clantune_scale.errors import ConfigError


def imported(module: str, *, method: str) -> ModuleType:
    """The module, for the method of the table that needs it.

    Raises:
        ConfigError: if it cannot be imported; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(
            f"method {method!r} needs {package}, which cannot be imported ({error}). "
            f"Run: pip install 'clantune-scale[peers]'"
        ) from error
