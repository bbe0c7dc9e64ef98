"""State that is made of numbers, texts and lists of them, as JSON holds it and back; a scheduler's, say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

# Stands for what JSON cannot hold (a function, a dict with keys that are no text): the live value stays.
_ABSENT = object()


def plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON holds of ``state``, one-element tensors as numbers; all else is left out."""
    return {key: value for key, value in _strip(state).items() if value is not _ABSENT}


def merged(live: Any, saved: Any) -> Any:
    """``saved`` (from :func:`plain`) with the types of ``live``, and what it lacks taken from there."""
    if isinstance(live, torch.Tensor) and not isinstance(saved, list | dict):
        return torch.full_like(live, saved)
    if isinstance(saved, dict) and isinstance(live, Mapping):
        return {**live, **{key: merged(live.get(key), value) for key, value in saved.items()}}
    if isinstance(saved, list):
        pairs = list(live) if isinstance(live, list | tuple) and len(live) == len(saved) else [None] * len(saved)
        values = [merged(old, new) for old, new in zip(pairs, saved, strict=True)]
        return tuple(values) if isinstance(live, tuple) else values
    return saved


def _strip(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else _ABSENT
    if isinstance(value, list | tuple):
        items = [_strip(item) for item in value]
        return _ABSENT if any(item is _ABSENT for item in items) else items
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: item for key, item in ((k, _strip(v)) for k, v in value.items()) if item is not _ABSENT}
    return _ABSENT
