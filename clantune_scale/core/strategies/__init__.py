"""Finds strategies: built-in ones by name, others by import path."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from clantune_scale.core.strategies.base import Decision, Population, RunFacts, Strategy
from clantune_scale.core.strategies.clan.strategy import ClanStrategy
from clantune_scale.core.strategies.classic import Classic
from clantune_scale.core.strategies.control import Control
from clantune_scale.core.strategies.halving import Halving
from clantune_scale.core.strategies.hdet import HDET
from clantune_scale.core.strategies.options import read_options, remedy
from clantune_scale.core.strategies.pbt import PBT
from clantune_scale.errors import ConfigError

STRATEGIES: dict[str, type[Strategy]] = {
    "clan": ClanStrategy,
    "classic": Classic,
    "pbt": PBT,
    "hdet": HDET,
    "halving": Halving,
    "control": Control,
}

__all__ = ["STRATEGIES", "Decision", "Population", "RunFacts", "Strategy", "build", "strategy_class"]


def strategy_class(name: str) -> type[Strategy]:
    """The class behind ``name``: a built-in's name, or ``"package.module:Class"``.

    Raises:
        ConfigError: if there is no strategy of that name, or the object is not a strategy.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    module_name, colon, class_name = name.partition(":")
    if not colon:
        hint = remedy(name, STRATEGIES)
        raise ConfigError(f"there is no strategy {name!r}. {hint} One of your own is named 'package.module:Class'.")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"strategy {name!r} cannot be imported: {error}. Give 'package.module:Class' of an importable class."
        ) from error
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise ConfigError(
            f"strategy {name!r} is {found!r}, not a strategy. Derive it from clantune_scale.strategies.Strategy."
        )
    return found


def build(name: str, facts: RunFacts, options: Mapping[str, Any] | None = None) -> Strategy:
    """A strategy for the run, its options checked.

    A strategy that takes options names their dataclass in its class attribute ``Options`` and gets an
    instance as its second argument; one without that attribute takes none.

    Raises:
        ConfigError: for an unknown name, an unknown option, or an option of the wrong type or range.
    """
    cls = strategy_class(name)
    options_class = getattr(cls, "Options", None)
    if options_class is not None:
        return cls(facts, read_options(options_class, options or {}, strategy=name))  # type: ignore[call-arg]
    if options:
        raise ConfigError(f"strategy {name!r} takes no options, but was given {dict(options)!r}. Leave them out.")
    return cls(facts)
