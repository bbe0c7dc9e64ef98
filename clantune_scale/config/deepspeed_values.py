"""Values of a DeepSpeed config as DeepSpeed reads them: "auto" is none, text may be a truth value, a block be null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

#: What other libraries fill in. DeepSpeed takes its default for it in the blocks that it validates, and nowhere else.
AUTO = "auto"
# How pydantic, with which DeepSpeed validates, spells them besides true, false and numbers.
_TRUE = ("1", "true", "t", "yes", "y", "on")

# JSON has whole numbers of any length.
_TOO_LARGE = 10**300


def block_of(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The block of a config; an empty one if it is missing or no object."""
    block = config.get(name)
    return block if isinstance(block, Mapping) else {}


def shown(value: Any) -> str:
    """A value as the file spells it, for errors: null, true, "text"."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that a float can hold; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < _TOO_LARGE


def number_of(block: Mapping[str, Any], key: str, default: float) -> float:
    """The number of a key; ``default`` if there is none (missing, null, "auto", text)."""
    value: Any = block.get(key, default)
    return float(value) if is_number(value) else default


def steps_of(block: Mapping[str, Any], key: str) -> int | None:
    """The whole positive number of a key, 1e6 among them; None if it holds none."""
    value = number_of(block, key, 0)
    return int(value) if math.isfinite(value) and value >= 1 and value == int(value) else None


def is_on(config: Mapping[str, Any], name: str) -> bool:
    """Whether a block is enabled; "auto" means DeepSpeed's default, which is off."""
    value = block_of(config, name).get("enabled", False)
    return value.lower() in _TRUE if isinstance(value, str) else bool(value)
