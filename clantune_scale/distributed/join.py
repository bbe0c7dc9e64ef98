"""Joining by config: the same file, dict or block for :func:`join` and for what is attached later."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from clantune_scale.config.deepspeed_file import BLOCK, extract, load_ds_config, parse_block
from clantune_scale.config.schema import ClanConfig
from clantune_scale.distributed import world
from clantune_scale.errors import ConfigError


def read_block(config: str | os.PathLike[str] | Mapping[str, Any] | ClanConfig) -> ClanConfig:
    """The ``clantune`` block of a config.

    Args:
        config: the block itself, or a dict or JSON file that has it under ``"clantune"``.

    Raises:
        ConfigError: if there is none, it cannot be used, or it says ``"enabled": false``.
    """
    block = config if isinstance(config, ClanConfig) else None
    if block is None:
        loaded = load_ds_config(config)
        block = parse_block(loaded) if "population_size" in loaded else extract(loaded)[1]
    if block is None:
        raise ConfigError(f'the config has no "{BLOCK}" block. Write at least "{BLOCK}": {{"population_size": 4}}.')
    if not block.enabled:
        raise ConfigError(
            f'"{BLOCK}" says "enabled": false, and there is no clan to join. Leave out join() and attach() then, or '
            f'set "population_size": 1 for the same loop without a clan.'
        )
    return block


def join(
    config: int | str | os.PathLike[str] | Mapping[str, Any] | ClanConfig,
    *,
    timeout_s: float | None = None,
    port: int | None = None,
) -> world.ClanWorld:
    """Joins the clan: from here on this process's member is its world. Call it before any process group exists.

    ``clantune_scale.initialize()`` joins by itself; a loop of your own calls this first. A second call with the
    same population size returns the first one's world.

    Args:
        config: the ``clantune`` block (see :func:`read_block`), or the population size alone.
        timeout_s, port: in place of what the block says under ``join``.

    Raises:
        ConfigError: if the config has no block that can be used.
        TopologyError: as :func:`clantune_scale.distributed.world.join` does.
    """
    block = ClanConfig(population_size=config) if isinstance(config, int) else read_block(config)
    if "deepspeed" in sys.modules:
        # A script that joins by itself starts DeepSpeed by itself too, before initialize() could prepare it.
        from clantune_scale.backends.deepspeed.engine import suppress_start_up_noise

        suppress_start_up_noise()
    return world.join(
        block.population_size,
        timeout_s=timeout_s or block.join.timeout_s,
        port=port or block.join.port,
        faults=None if isinstance(config, int) else block.faults,
    )
