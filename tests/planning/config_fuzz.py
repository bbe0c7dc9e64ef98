"""Public configs, spoilt: keys dropped, "auto", nulls, wrong types, numbers as text, misspelt keys and values."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

from tests.planning.public_configs import CASES

_WRONG = (None, "auto", True, False, -1, 0, 3, 0.5, 1e9, 1e300, "", "text", "1", [], [1, 2], {}, {"a": 1})
_BLOCKS: tuple[dict[str, Any], ...] = (
    {"population_size": 4},
    {"population_size": 4, "total_steps": 1000, "genes": ["lr", "weight_decay", "clip", "beta2"]},
    {"population_size": 2, "members": "line", "genes": {"lr": {"mode": "absolute"}}, "tracking": {"run_name": "a"}},
    {"population_size": 4, "strategy": {"name": "pbt"}, "genes": {"lr:head": {"groups": ["head"]}}, "duty_cycle": 0.2},
)
_RIGHT = tuple(case for case in CASES if not case.errors)
Path = tuple[Any, ...]


def mutants(number: int, *, seed: int) -> Iterator[tuple[dict[str, Any], int, tuple[str, ...]]]:
    """Configs with one to three faults each, the number of ranks, and further words of the command line."""
    draw = random.Random(seed)
    for _ in range(number):
        # Of a config with errors one more fault shows little.
        case = draw.choice(CASES if draw.random() < 0.25 else _RIGHT)
        config = copy.deepcopy({**case.config, "clantune": draw.choice(_BLOCKS)})
        for _ in range(draw.randint(1, 3)):
            paths = list(_paths(config))
            if paths:
                draw.choice(_FAULTS)(config, draw.choice(paths), draw)
        yield config, draw.choice((case.world_size, case.world_size, 6)), case.options


def _paths(value: Any, path: Path = ()) -> Iterator[Path]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from _paths(inner, (*path, key))


def _holder(config: Any, path: Path) -> Any:
    for key in path[:-1]:
        config = config[key]
    return config


def _drop(config: Any, path: Path, draw: random.Random) -> None:
    del _holder(config, path)[path[-1]]


def _replace(config: Any, path: Path, draw: random.Random) -> None:
    _holder(config, path)[path[-1]] = copy.deepcopy(draw.choice(_WRONG))


def _as_text(config: Any, path: Path, draw: random.Random) -> None:
    holder = _holder(config, path)
    holder[path[-1]] = str(holder[path[-1]])


def _negate(config: Any, path: Path, draw: random.Random) -> None:
    holder = _holder(config, path)
    if isinstance(holder[path[-1]], int | float):
        holder[path[-1]] = -holder[path[-1]]


def _misspell(config: Any, path: Path, draw: random.Random) -> None:
    """The key, or the value if that is text."""
    holder, key = _holder(config, path), path[-1]
    if isinstance(holder[key], str) and draw.random() < 0.5:
        holder[key] = _swapped(holder[key], draw)
    elif isinstance(key, str):
        holder[_swapped(key, draw)] = holder.pop(key)


def _swapped(word: str, draw: random.Random) -> str:
    if len(word) < 2:
        return word + "x"
    place = draw.randrange(len(word) - 1)
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


_FAULTS: tuple[Callable[[Any, Path, random.Random], None], ...] = (
    _drop,
    _replace,
    _replace,
    _as_text,
    _negate,
    _misspell,
)
