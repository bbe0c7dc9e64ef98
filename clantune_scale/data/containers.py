"""The tensors in a batch, whatever holds them: mappings, sequences, named tuples, dataclasses, nested as they come."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch


def map_leaves(call: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with each leaf replaced by ``call(leaf)``; containers are new ones of the same kind.

    A leaf is what is no mapping, list, tuple or dataclass. The order of the calls is that of the containers.
    """
    if isinstance(value, Mapping):
        return _with_items(value, {key: map_leaves(call, item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        items = [map_leaves(call, item) for item in value]
        # A named tuple takes its fields one by one.
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_dataclass(value) and not isinstance(value, type):
        copied = copy.copy(value)
        for field in fields(value):
            # Past a frozen class's own __setattr__, and past __init__, which may ask for other arguments.
            object.__setattr__(copied, field.name, map_leaves(call, getattr(value, field.name)))
        return copied
    return call(value)


def leaves_of(value: Any) -> list[Any]:
    """The leaves, in the order of :func:`map_leaves`."""
    found: list[Any] = []
    map_leaves(found.append, value)
    return found


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor among the leaves, in order."""
    return (leaf for leaf in leaves_of(value) if isinstance(leaf, torch.Tensor))


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with its tensors on ``device``."""
    return map_leaves(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, value)


def call_on(model: Callable[..., Any], batch: Any) -> Any:
    """The model's output: a mapping is passed by keyword, a list or tuple by position, anything else as it is."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, list | tuple) else model(batch)


def _with_items(value: Mapping[Any, Any], items: dict[Any, Any]) -> Mapping[Any, Any]:
    if type(value) is dict:
        return items
    try:
        copied = copy.copy(value)
        for key, item in items.items():
            copied[key] = item  # type: ignore[index]  # one that cannot be copied or written to is caught below
    except TypeError:
        return items
    return copied
