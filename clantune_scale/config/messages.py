"""Turns pydantic's errors about the block into our sentences: path, value, what to change."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from clantune_scale.config.schema import ClanConfig
from clantune_scale.core.spelling import nearest

Location = tuple[int | str, ...]


def explain(error: ValidationError, *, root: str) -> str:
    """All problems in one text, one line each if there are several.

    Args:
        error: what validating a :class:`ClanConfig` raised.
        root: name of the block, the first part of every path.
    """
    problems = [_sentence(detail, root) for detail in error.errors(include_url=False)]
    if len(problems) == 1:
        return problems[0]
    return f"the {root!r} block has {len(problems)} problems:" + "".join(f"\n  - {problem}" for problem in problems)


def _sentence(detail: ErrorDetails, root: str) -> str:
    location = detail["loc"]
    path = ".".join(map(str, (root, *location)))
    if detail["type"] == "extra_forbidden":
        return f"{path} is not a key of the block.{_right_key(location)}"
    if detail["type"] == "missing":
        return f'{path} is missing. Add it, for example "{location[-1]}": 4. It means: {_meaning(location)}'
    return f"{path} is {detail['input']!r}, and {_demand(detail)}. It means: {_meaning(location)}"


def _demand(detail: ErrorDetails) -> str:
    message = detail["msg"].removeprefix("Value error, ").rstrip(".")
    return message.replace("Input should be", "should be").replace("String should", "should")


def _right_key(location: Location) -> str:
    *parents, key = location
    fields = _fields_at(tuple(parents))
    found = nearest(str(key), fields)
    if found:
        return f" Did you mean {found!r}?"
    homes = [name for name in ClanConfig.model_fields if str(key) in _fields_at((name,))]
    if homes:
        return f" It belongs in {homes[0]!r}."
    return f" Known there: {', '.join(fields)}."


def _fields_at(location: Location) -> list[str]:
    annotation = _annotation_at(ClanConfig, location)
    return list(annotation.model_fields) if _is_model(annotation) else []


def _meaning(location: Location) -> str:
    """The documentation of the innermost field on the way to ``location``."""
    meaning = ""
    for end in range(1, len(location) + 1):
        parent = _annotation_at(ClanConfig, location[: end - 1])
        if _is_model(parent) and location[end - 1] in parent.model_fields:
            meaning = parent.model_fields[location[end - 1]].description or meaning
    return meaning


def _annotation_at(annotation: Any, location: Location) -> Any:
    if not location or annotation is None:
        return annotation
    if _is_model(annotation):
        field = annotation.model_fields.get(location[0])
        return _annotation_at(field.annotation if field else None, location[1:])
    # dict[str, Model]: the key is the user's own, the model is the last argument.
    inner = get_args(annotation)
    return _annotation_at(inner[-1] if inner else None, location[1:])


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
