"""Runs an unmodified DeepSpeed script as a clan: ``deepspeed --module clantune_scale.run train.py ...``.

It joins a clan of groups before the script starts, so that the script may call ``deepspeed.init_distributed()`` first,
puts :func:`clantune_scale.initialize` in the place of ``deepspeed.initialize``, and ends the run when the
script does. The script's ``--deepspeed_config`` must hold the ``"clantune"`` block.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import runpy
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Subset

from clantune_scale.config.deepspeed_file import extract, load_ds_config
from clantune_scale.core.extras import require
from clantune_scale.data.sampler import is_map_style
from clantune_scale.errors import ConfigError

HOLDOUT = 0.05


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the script that ``argv`` names (the process's own arguments if None).

    Raises:
        ClanError: if DeepSpeed is not installed.
        ConfigError: if the script's arguments name no DeepSpeed config, or the script ends without a clan.
    """
    options = _parse(argv)
    # Before ranks wait for each other.
    require("deepspeed", needed_by="clantune_scale.run")
    _, block = extract(load_ds_config(_config_path(options.arguments)))
    is_clan = block is not None and block.enabled
    if block is not None and is_clan and block.members == "groups":
        from clantune_scale.backends.join import join

        join(block)
    # The launcher's --local_rank comes before the script's own arguments.
    local_rank = [f"--local_rank={options.local_rank}"] if options.local_rank is not None else []
    sys.argv = [options.script, *local_rank, *options.arguments]
    sys.path.insert(0, str(Path(options.script).resolve().parent))
    import deepspeed

    from clantune_scale.backends.deepspeed.engine import suppress_start_up_noise

    # The script may start DeepSpeed before it calls initialize().
    suppress_start_up_noise()
    engines: list[Any] = []
    initialize = deepspeed.initialize
    deepspeed.initialize = _replacement(options.eval_data, engines)
    try:
        runpy.run_path(options.script, run_name="__main__")
    finally:
        deepspeed.initialize = initialize
    clans = [engine.clan for engine in engines if hasattr(engine, "clan")]
    if is_clan and not clans:
        raise ConfigError(
            f"{options.script} ended without an engine that has a clan: it called deepspeed.initialize() "
            f"{len(engines)} times with the config's block. It trained as plain DeepSpeed, or not at all. Pass the "
            f"config's file to deepspeed.initialize() as it is."
        )
    for clan in clans:
        clan.finish()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="clantune_scale.run", description=__doc__)
    parser.add_argument("--local_rank", type=int, default=None, help="set by the launcher, passed on")
    parser.add_argument(
        "--eval_data",
        default=None,
        help=f"module:callable that returns the dataset on which members are compared; by default "
        f"{HOLDOUT:.0%} of the training data is held out",
    )
    parser.add_argument("script", help="the training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own arguments")
    return parser.parse_args(argv)


def _config_path(arguments: Sequence[str]) -> str:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--deepspeed_config")
    found, _ = finder.parse_known_args(list(arguments))
    if found.deepspeed_config is None:
        raise ConfigError(
            f"the script's arguments {list(arguments)} name no DeepSpeed config. Pass --deepspeed_config FILE to it; a "
            f"script that passes config=... calls clantune_scale.initialize() itself."
        )
    return found.deepspeed_config


def _replacement(eval_data: str | None, engines: list[Any]) -> Callable[..., Any]:
    """``clantune_scale.initialize`` with a validation set found for it; keeps the engines that it makes."""
    from clantune_scale.backends.deepspeed.attach import initialize

    @wraps(initialize)
    def initialize_with_validation(*args: Any, **kwargs: Any) -> Any:
        # A script may pass the training data by position, as deepspeed.initialize allows.
        call = inspect.signature(initialize).bind(*args, **kwargs)
        validation = _load(eval_data) if eval_data else None
        training_data = call.arguments.get("training_data")
        if validation is None and training_data is not None:
            call.arguments["training_data"], validation = hold_out(training_data)
        call.arguments["eval_data"] = validation
        result = initialize(*call.args, **call.kwargs)
        engines.append(result[0])
        return result

    return initialize_with_validation


def hold_out(dataset: Dataset[Any], share: float = HOLDOUT) -> tuple[Subset[Any], Subset[Any]]:
    """Splits a map-style dataset: every 1/share-th example goes to validation, the rest to training.

    Raises:
        ConfigError: if it has no length.
    """
    if not is_map_style(dataset):
        raise ConfigError(
            f"the training data is a {type(dataset).__name__} without a length, of which nothing can be held out. Name "
            f"a validation set: --eval_data module:callable."
        )
    stride = round(1 / share)
    indices = np.arange(len(dataset))  # type: ignore[arg-type]  # torch's Dataset declares no length
    held = indices % stride == stride - 1
    return Subset(dataset, indices[~held].tolist()), Subset(dataset, indices[held].tolist())


def _load(name: str) -> Dataset[Any]:
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(f"--eval_data {name!r} is not module:callable. Write it as package.module:function.")
    return getattr(importlib.import_module(module_name), attribute)()


if __name__ == "__main__":
    main()
