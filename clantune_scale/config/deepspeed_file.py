"""Finds the ``clantune`` block in everything that ``deepspeed.initialize(config=...)`` takes."""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterator, Mapping
from typing import Any

import hjson
from pydantic import ValidationError

from clantune_scale.config.messages import explain
from clantune_scale.config.schema import ClanConfig
from clantune_scale.core.spelling import nearest
from clantune_scale.errors import ConfigError

BLOCK = "clantune"

#: What a front door takes as ``config``: a file, its content as a dict, or the validated block.
ConfigSource = str | os.PathLike[str] | Mapping[str, Any] | ClanConfig


def load_config(config: ConfigSource) -> tuple[dict[str, Any], ClanConfig | None]:
    """Reads a config as ``initialize``, ``attach`` and ``join`` read it.

    Args:
        config: a DeepSpeed config with a ``"clantune"`` block (a dict, the path of a JSON or Hjson file, or URL-safe
            base64 of its text), or the block itself.

    Returns:
        Everything beside the block (empty if ``config`` is the block itself), and the validated block, or None if
        there is none.

    Raises:
        ConfigError: if the config cannot be read or the block cannot be used.
    """
    if isinstance(config, ClanConfig):
        return {}, config
    loaded = load_ds_config(config)
    return ({}, parse_block(loaded)) if "population_size" in loaded else extract(loaded)


def require_block(block: ClanConfig | None) -> ClanConfig:
    """The block of a config that has to hold one.

    Raises:
        ConfigError: if there is none, or it says ``"enabled": false``.
    """
    if block is None:
        raise ConfigError(f'the config has no "{BLOCK}" block. Write at least "{BLOCK}": {{"population_size": 4}}.')
    if not block.enabled:
        raise ConfigError(
            f'"{BLOCK}" says "enabled": false, so there is no clan to join. Leave out join() and attach(), or set '
            f'"population_size": 1 to run the same loop without a clan.'
        )
    return block


def load_ds_config(config: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Reads a DeepSpeed config as DeepSpeed 0.19 does.

    Args:
        config: a dict, the path of a JSON or Hjson file, or URL-safe base64 of its text.

    Raises:
        ConfigError: if it is none of these, does not parse, repeats a key, or is not an object.
    """
    if isinstance(config, Mapping):
        return dict(config)
    if not isinstance(config, (str, os.PathLike)):
        raise ConfigError(
            f"the DeepSpeed config is of type {type(config).__name__}. Pass a dict, a path, or base64 of JSON."
        )
    if os.path.isfile(config):
        with open(config, encoding="utf-8") as file:
            return _parse(file.read(), source=f"DeepSpeed config {os.fspath(config)!r}")
    try:
        text = base64.urlsafe_b64decode(os.fspath(config)).decode("utf-8")
    except (binascii.Error, UnicodeError) as error:
        raise ConfigError(
            f"the DeepSpeed config {_shortened(os.fspath(config))!r} is neither an existing file nor base64 of JSON. "
            f"Check the path (the current folder is {os.getcwd()!r})."
        ) from error
    return _parse(text, source="base64 DeepSpeed config")


def extract(ds_config: Mapping[str, Any]) -> tuple[dict[str, Any], ClanConfig | None]:
    """Takes the block out of a loaded DeepSpeed config.

    Returns:
        The config without the block (a shallow copy; the argument is left as it was), and the validated
        block, or None if there is none.

    Raises:
        ConfigError: if the block is malformed (all problems at once), or a top-level key looks like a misspelt
            block: DeepSpeed ignores keys that it does not know.
    """
    for key in ds_config:
        if _is_near_miss(key):
            raise ConfigError(
                f"the DeepSpeed config has a block {key!r}, which DeepSpeed would ignore without a word. "
                f"Rename it to {BLOCK!r}."
            )
    rest = {key: value for key, value in ds_config.items() if key != BLOCK}
    return rest, parse_block(ds_config[BLOCK]) if BLOCK in ds_config else None


def parse_block(block: Any) -> ClanConfig:
    """Validates the content of the block.

    Raises:
        ConfigError: with every problem, its path, its value and what to change.
    """
    if isinstance(block, ClanConfig):
        return block
    if not isinstance(block, Mapping):
        raise ConfigError(f'"{BLOCK}" is {block!r}, not an object. Write at least "{BLOCK}": {{"population_size": 4}}.')
    autos = [".".join([BLOCK, *path]) for path in _auto_paths(block)]
    if autos:
        raise ConfigError(f'{", ".join(autos)} is "auto", which nothing fills in here. Write a value or drop the key.')
    try:
        return ClanConfig.model_validate(dict(block))
    except ValidationError as error:
        raise ConfigError(explain(error, root=BLOCK)) from None


def _parse(text: str, *, source: str) -> dict[str, Any]:
    try:
        loaded = hjson.loads(text, object_pairs_hook=_without_repeated_keys)
    except hjson.HjsonDecodeError as error:
        raise ConfigError(f"the {source} does not parse: {error}. Mend it there.") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"the {source} holds a {type(loaded).__name__}, not an object. Put it in {{ }}.")
    return loaded


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        raise ConfigError(f"the DeepSpeed config repeats the keys {repeated} in one object. Keep one of each.")
    return dict(pairs)


def _is_near_miss(key: Any) -> bool:
    if not isinstance(key, str) or key == BLOCK:
        return False
    plain = "".join(letter for letter in key.lower() if letter.isalnum())
    # No key of DeepSpeed's own starts with "clan" or comes near the name (the nearest, "load_universal", is at 0.48).
    return plain.startswith("clan") or nearest(plain, [BLOCK], cutoff=0.75) is not None


def _auto_paths(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(value, str) and value == "auto":
        yield path
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _auto_paths(inner, (*path, str(key)))
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _auto_paths(inner, (*path, str(index)))


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."
