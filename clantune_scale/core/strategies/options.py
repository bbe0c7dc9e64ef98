"""Reads a strategy's free-form ``options`` into its typed dataclass; errors name the nearest known option."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from clantune_scale.core.spelling import nearest
from clantune_scale.errors import ConfigError

Options = TypeVar("Options")


def remedy(given: str, known: Iterable[str]) -> str:
    """What to write instead of ``given``: the nearest known name, or all of them if none is near."""
    names = sorted(known)
    found = nearest(given, names)
    if found:
        return f"Did you mean {found!r}?"
    return f"Choose from: {', '.join(names)}." if names else "It takes none."


def read_options(cls: type[Options], given: Mapping[str, Any], *, strategy: str) -> Options:
    """An instance of the options dataclass ``cls``, its types checked; it checks ranges itself.

    Raises:
        ConfigError: for an unknown option, or a value of another type.
    """
    hints = get_type_hints(cls)
    known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise ConfigError(f"strategy {strategy!r} has no option {name!r}. {remedy(name, known)}")
    return cls(**{name: _typed(value, hints[name], f"{strategy}.{name}") for name, value in given.items()})


def _typed(value: Any, hint: Any, where: str) -> Any:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            choices = ", ".join(repr(choice) for choice in get_args(hint))
            raise ConfigError(f"option {where} is {value!r}. Choose from: {choices}.")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"option {where} is {value!r}, a {type(value).__name__}. Give a list.")
        item_hint = get_args(hint)[0]
        return tuple(_typed(item, item_hint, f"{where}[{index}]") for index, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"option {where} is {value!r}, a {type(value).__name__}. Give a {hint.__name__}.")
    return value


def require(holds: bool, name: str, value: object, wanted: str) -> None:
    """Raises a ConfigError that names the option, its value and what it should be, unless ``holds``."""
    if not holds:
        raise ConfigError(f"strategy option {name} is {value}. It must be {wanted}.")
