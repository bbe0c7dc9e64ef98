"""Putting a function in the place of an object's method, and taking it out again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def replace_method(target: Any, name: str, method: Callable) -> Callable[[], None]:
    """Shadows ``target.name`` by an instance attribute; returns what undoes it."""
    had_own = name in vars(target)
    before = getattr(target, name)
    setattr(target, name, method)

    def restore() -> None:
        if had_own:
            setattr(target, name, before)
        else:
            delattr(target, name)

    return restore
