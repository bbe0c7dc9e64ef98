"""What a clan takes from the Trainer, and what it refuses there before anything is built."""

from __future__ import annotations

from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset

from clantune_scale.config.batch import ACCUMULATION, CLIPPING, MICRO, TRAIN, clipping_of
from clantune_scale.config.deepspeed_file import ConfigSource, load_config, require_block
from clantune_scale.errors import ConfigError
from clantune_scale.integrations.common import block_in_loop
from clantune_scale.runtime.clan import Clan
from clantune_scale.runtime.line.refusals import may_compete

_STRATEGIES = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)


class RunSettings:
    """A Trainer's run as a clan sees it.

    Args:
        config: that the callback was given.
        trainer: of the run.
        module: that it trains.

    Raises:
        ConfigError: if the run cannot be tuned in this form.
    """

    def __init__(self, config: ConfigSource, trainer: Trainer, module: LightningModule) -> None:
        self._trainer, self._module = trainer, module
        self._written, found = load_config(config)
        self._block = block_in_loop(
            require_block(found),
            loop="Lightning's Trainer",
            resume="resume with fit(ckpt_path=...)",
            directory=Path(trainer.default_root_dir),
        )
        self.has_deepspeed = isinstance(trainer.strategy, DeepSpeedStrategy)
        _refuse_strategy(trainer)

    @property
    def model(self) -> torch.nn.Module:
        """What the clan is attached to: the Trainer's wrapper, or the module itself."""
        wrapper = self._trainer.strategy.model
        assert wrapper is not None
        return wrapper

    @property
    def optimizers(self) -> list[torch.optim.Optimizer] | None:
        """None for a DeepSpeed engine's own."""
        return None if self.has_deepspeed else list(self._trainer.optimizers)

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """By which the Trainer takes its steps; None if it does not scale the loss."""
        return getattr(self._trainer.precision_plugin, "scaler", None)

    def config(self) -> dict[str, Any]:
        """For ``clantune_scale.attach``: the block, and the batch as the Trainer has it.

        Raises:
            ConfigError: if the config contradicts the Trainer.
        """
        trainer = self._trainer
        given = {MICRO: self._micro_batch_size(), ACCUMULATION: trainer.accumulate_grad_batches}
        for key, value in given.items():
            written = self._written.get(key)
            if None not in (written, value) and written not in ("auto", value):
                raise ConfigError(f"the config says {key}: {written}, and the Trainer has {value}. Leave it out there.")
        clip = clipping_of(self._written)
        if clip is not None and clip != (trainer.gradient_clip_val or 0):
            raise ConfigError(
                f"the config says {CLIPPING}: {clip:g}, and it is the Trainer that clips. Leave it out there, and give "
                f"Trainer(gradient_clip_val={clip:g})."
            )
        known = {key: value for key, value in given.items() if value is not None}
        if TRAIN in self._written:
            known[TRAIN] = self._written[TRAIN]
        return {**known, "clantune": self._block}

    def validation(
        self, dataset: Dataset[Any] | None, collate_fn: Callable[[list[Any]], Any] | None
    ) -> tuple[Dataset[Any], Callable[[list[Any]], Any] | None]:
        """The data on which members are compared, and what joins its samples: those of the first validation loader.

        Raises:
            ConfigError: if there is none.
        """
        if dataset is not None:
            return dataset, collate_fn
        trainer = self._trainer
        if trainer.val_dataloaders is None:
            # As the Trainer does it before its first epoch, unless that epoch validates nothing.
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
            trainer.training = True
        loaders = _loaders(trainer.val_dataloaders)
        if not loaders:
            raise ConfigError(
                "a clan compares its members on validation data, and the Trainer has none. Give fit() a validation "
                "dataloader (and leave limit_val_batches above 0), or pass ClanCallback(..., eval_data=dataset)."
            )
        return loaders[0].dataset, collate_fn or loaders[0].collate_fn

    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run, if the Trainer knows them."""
        steps = self._trainer.estimated_stepping_batches
        return int(steps) if steps not in (-1, float("inf")) else None

    def num_samples(self) -> int | None:
        """Examples of the training data; None if it has no length."""
        datasets = [loader.dataset for loader in _loaders(self._trainer.train_dataloader)]
        return len(datasets[0]) if len(datasets) == 1 and isinstance(datasets[0], Sized) else None

    def check_attached(self, clan: Clan) -> None:
        """Refuses a module that draws its own batches, if members are to train on batches that were drawn before.

        Raises:
            ConfigError: then. The clan is let go.
        """
        draws = is_param_in_hook_signature(self._module.training_step, "dataloader_iter", explicit=True)
        if draws and may_compete(clan.strategy):
            clan.abandon()
            raise ConfigError(
                "training_step(dataloader_iter) draws its batches itself, and competing members train on equal ones. "
                'Take (batch, batch_idx) in its place, or leave the competition out: "strategy": {"name": "clan", '
                '"options": {"trial_cost": 0}}.'
            )

    def _micro_batch_size(self) -> int | None:
        """Samples per rank and backward pass, if a loader says it."""
        for loader in _loaders(self._trainer.train_dataloader):
            size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
            if isinstance(size, int):
                return size
        return None


def _refuse_strategy(trainer: Trainer) -> None:
    strategy = trainer.strategy
    if not isinstance(strategy, _STRATEGIES):
        raise ConfigError(
            f"the Trainer's strategy is {type(strategy).__name__}, and the clan knows SingleDeviceStrategy, "
            f"DDPStrategy, ModelParallelStrategy (FSDP2) and DeepSpeedStrategy. Use one of these."
        )
    if getattr(strategy, "_ddp_comm_state", None) is not None:
        raise ConfigError(
            "DDPStrategy has a communication hook with a state of its own, which the clan does not put back between "
            "turns. Leave ddp_comm_state out."
        )


def _loaders(given: Any) -> list[Any]:
    """The dataloaders in what the Trainer has: one, or a collection."""
    found = getattr(given, "flattened", None) or tree_leaves(given)
    return [loader for loader in found if hasattr(loader, "dataset")]
