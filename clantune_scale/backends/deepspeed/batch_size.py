"""A batch size that the script changes while it trains (a ramp-up): ``engine.set_train_batch_size``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clantune_scale.errors import ConfigError
from clantune_scale.gradients.hooks import replace_method


def hook_batch_size(engine: Any, num_members: int, callback: Callable[[int], None]) -> list[Callable[[], None]]:
    """Has the engine's own calls that change its batch size follow the clan.

    Args:
        engine: DeepSpeed's, of one member.
        num_members: the script's batch is shared out among them, as the config's is.
        callback: is given the micro-batches per step of each member.

    Returns:
        Functions that remove the hooks.
    """

    def set_train_batch_size(train_batch_size: int) -> None:
        each = engine.train_micro_batch_size_per_gpu() * engine.dp_world_size * num_members
        if train_batch_size < each or train_batch_size % each:
            raise ConfigError(
                f"engine.set_train_batch_size({train_batch_size}): {num_members} members of {engine.dp_world_size} "
                f"data-parallel ranks with micro-batches of {engine.train_micro_batch_size_per_gpu()} take multiples "
                f"of {each}. Ask for one of them."
            )
        callback(train_batch_size // each)

    def set_train_micro_batch_size(micro_batch_size: int) -> None:
        raise ConfigError(
            f"engine.set_train_micro_batch_size({micro_batch_size}): the clan deals examples out in micro-batches of "
            f"{engine.train_micro_batch_size_per_gpu()}. Call engine.set_train_batch_size(), which changes their "
            f"number."
        )

    return [
        replace_method(engine, "set_train_batch_size", set_train_batch_size),
        replace_method(engine, "set_train_micro_batch_size", set_train_micro_batch_size),
    ]
