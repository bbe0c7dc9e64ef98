"""Joining the clan by config. :func:`join` accepts the file, dict or block that ``attach()`` gets later."""

from __future__ import annotations

import sys

from clantune_scale.config.deepspeed_file import ConfigSource, load_config, require_block
from clantune_scale.config.schema import ClanConfig
from clantune_scale.distributed import world


def join(
    config: int | ConfigSource,
    *,
    timeout_s: float | None = None,
    port: int | None = None,
) -> world.ClanWorld:
    """Joins the clan and makes this process's member its world. Call it before any process group exists.

    ``clantune_scale.initialize()`` joins by itself. Your own loop calls this function first. A second call with the
    same population size returns the world of the first call.

    Args:
        config: the ``clantune`` block, a dict or JSON file that holds it, or only the population size.
        timeout_s, port: override the block's ``join`` section.

    Raises:
        ConfigError: if the config has no block, the block is invalid, or it says ``"enabled": false``.
        TopologyError: see :func:`clantune_scale.distributed.world.join`.
    """
    block = ClanConfig(population_size=config) if isinstance(config, int) else require_block(load_config(config)[1])
    if "deepspeed" in sys.modules:
        # A script that calls join() also starts DeepSpeed itself, before initialize() could prepare it.
        from clantune_scale.backends.deepspeed.engine import suppress_start_up_noise

        suppress_start_up_noise()
    return world.join(
        block.population_size,
        timeout_s=timeout_s or block.join.timeout_s,
        port=port or block.join.port,
        faults=None if isinstance(config, int) else block.faults,
    )
