"""What a Trainer's settings say of a clan: the block, the examples, and what cannot be done with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.nn.parallel import DataParallel
from torch.utils.data import Dataset
from transformers import Trainer

from clantune_scale.config.deepspeed_file import BLOCK, ConfigSource, load_config, require_block
from clantune_scale.config.schema import ClanConfig
from clantune_scale.errors import ConfigError

#: Where the block is looked for if neither the callback nor ``--deepspeed`` has one.
FILE = "clan.json"


def find_block(config: ConfigSource | None, trainer: Trainer) -> ClanConfig:
    """The ``clantune`` block of a Trainer's run.

    Args:
        config: that the callback was given, or None.
        trainer: whose DeepSpeed config may have it.

    Raises:
        ConfigError: if there is none, or there are two that differ.
    """
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    in_deepspeed = None if plugin is None else plugin.hf_ds_config.config
    # With accelerate's own launcher, the plugin reads the file before the arguments do.
    beside = load_config({BLOCK: in_deepspeed[BLOCK]})[1] if in_deepspeed and BLOCK in in_deepspeed else None
    if config is not None:
        given = require_block(load_config(config)[1])
        if beside is not None and beside != given:
            raise ConfigError(
                f'ClanCallback has a config, and the DeepSpeed config has another "{BLOCK}" block. Keep one of them.'
            )
        return given
    if beside is not None:
        return require_block(beside)
    if Path(FILE).is_file():
        return require_block(load_config(FILE)[1])
    raise ConfigError(
        f'ClanCallback found no "{BLOCK}" block: it was given none, '
        f"{'the DeepSpeed config has none' if in_deepspeed else 'there is no --deepspeed config'}, and there is no "
        f'{FILE} in the working directory. Pass ClanCallback({{"population_size": 4}}), for example.'
    )


def examples_of(trainer: Trainer, given: Dataset[Any] | str | None) -> tuple[Any, Callable[[list[Any]], Any]]:
    """The dataset on which members are compared, and its collator, as the Trainer's own evaluation has them."""
    data = trainer.eval_dataset if given is None else given
    if isinstance(data, Mapping) or (isinstance(data, str) and not isinstance(trainer.eval_dataset, Mapping)):
        names = sorted(data) if isinstance(data, Mapping) else []
        raise ConfigError(
            f"the Trainer has the evaluation datasets {names}. Name the one that members are compared on: "
            f'ClanCallback(eval_data="{names[0] if names else "validation"}").'
            if names
            else f"ClanCallback has eval_data={data!r}, and the Trainer's eval_dataset is no dict of datasets."
        )
    if data is None:
        raise ConfigError(
            "a clan compares its members on common examples and there are none. Pass eval_dataset=... to Trainer, or "
            "eval_data=... to ClanCallback: a map-style dataset apart from the training and test data."
        )
    loader = trainer.get_eval_dataloader(data)
    return loader.dataset, loader.collate_fn


def refusals(trainer: Trainer) -> Iterator[str]:
    """Settings of a Trainer with which a clan cannot train, or was not tried."""
    args, accelerator = trainer.args, trainer.accelerator
    if trainer.state.is_hyper_param_search:
        yield (
            "hyperparameter_search() trains anew for each trial, and a clan tunes inside one run. Call train(), or "
            "take ClanCallback out."
        )
    if args.n_gpu > 1 or isinstance(trainer.model_wrapped, DataParallel):
        yield (
            "the model is under DataParallel, whose replicas live for one forward pass. Start one process per device "
            "with torchrun, or make one device visible."
        )
    if args.auto_find_batch_size:
        yield (
            "auto_find_batch_size begins training anew with another batch when memory runs out. Set it to False and "
            "per_device_train_batch_size to what fits."
        )
    if args.optim in ("lomo", "adalomo"):
        yield f"the optimizer {args.optim} updates weights during backward, where no gene reaches it. Use another one."
    if trainer.is_fsdp_enabled and getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
        yield "the Trainer uses FSDP1, which a clan does not know. Set fsdp_version to 2 in fsdp_config."
    if getattr(accelerator, "parallelism_config", None) is not None:
        yield (
            "the Trainer shards the model or its sequences over devices by a parallelism_config, with which a clan was "
            "not tried. Leave it out."
        )
    if accelerator.distributed_type.value == "XLA":
        yield "the Trainer runs on XLA, with which a clan was not tried. Use another device."
