"""The callback: attaches a clan when the Trainer starts to train, and finishes it when the Trainer ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import Dataset

import clantune_scale
from clantune_scale.backends.torch.loop_clan import LoopClan
from clantune_scale.config.deepspeed_file import ConfigSource
from clantune_scale.integrations import common
from clantune_scale.integrations.lightning.carrying import Carrier
from clantune_scale.integrations.lightning.evaluation import ValidationStep
from clantune_scale.integrations.lightning.settings import RunSettings
from clantune_scale.integrations.lightning.turns import Turns
from clantune_scale.results.champion import Summary
from clantune_scale.runtime.genome_application import Setter


class ClanCallback(Callback):
    """Tunes a training run of Lightning's Trainer by a clan on the line.

    Accumulation, batch size, number of steps and validation data come from the Trainer. Checkpoints of the Trainer hold
    the clan, and ``fit(ckpt_path=...)`` goes on with it. ``trainer.global_step``, epochs, schedulers and the data that
    training reads are those of a run without a clan.

    Args:
        config: a ``clantune`` block, or a DeepSpeed-style config that has one: a dict or a JSON file. Members are
            on the line.
        evaluate: ``(module, batch) -> loss`` on a batch of the validation data; None takes what ``validation_step``
            returns, or what it logs as ``monitor``.
        monitor: name of the metric that ``validation_step`` logs and members are compared by; lower is better.
        eval_data: map-style dataset on which members are compared; None takes the first validation dataloader's.
        collate_fn: joins samples of it to a batch; None takes that dataloader's.
        gene_setters: by target name, a function that puts a gene's value into effect.

    Attributes:
        clan: while the Trainer trains; None before.
        summary: of the finished run, with the champion and where its files are.

    Raises:
        ConfigError: from ``fit``, before the first step, if the run cannot be tuned in this form.
    """

    def __init__(
        self,
        config: ConfigSource,
        *,
        evaluate: Callable[[Any, Any], Any] | None = None,
        monitor: str | None = None,
        eval_data: Dataset[Any] | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        gene_setters: Mapping[str, Setter] | None = None,
    ) -> None:
        self._config, self._evaluate, self._monitor = config, evaluate, monitor
        self._eval_data, self._collate_fn, self._setters = eval_data, collate_fn, gene_setters
        self._settings: RunSettings | None = None
        self._carrier = Carrier()
        self._num_rounds = 0
        self.clan: LoopClan | None = None
        self.summary: Summary | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot be done right, before anything is built."""
        if stage == "fit":
            self._settings = RunSettings(self._config, trainer, pl_module)
            self.clan = self.summary = None
            self._carrier.release()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches the clan: weights, optimizers and schedules are restored if the run is resumed."""
        settings = self._settings
        assert settings is not None, "Lightning calls setup() first"
        self._carrier.check(trainer)
        turns = Turns(trainer, pl_module)
        data, collate_fn = settings.validation(self._eval_data, self._collate_fn)
        clan = clantune_scale.attach(
            settings.model,
            settings.optimizers,
            config=settings.config(),
            eval_data=data,
            collate_fn=collate_fn,
            evaluate=ValidationStep(trainer, pl_module, evaluate=self._evaluate, monitor=self._monitor),
            gene_setters=self._setters,
            total_steps=settings.total_steps(),
            num_samples=settings.num_samples(),
            scaler=settings.scaler,
            train_step=turns,
            watch=turns.watch,
        )
        settings.check_attached(clan)
        self.clan = clan
        self._carrier.load(trainer, clan)
        self._carrier.follow(trainer, clan)
        self._num_rounds = clan.phases.position.plan.index

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Reads the gradient norm before the Trainer clips, in the steps that the clan probes."""
        clan, settings = self.clan, self._settings
        if clan is not None and settings is not None and not settings.has_deepspeed and clan.phases.position.ends_phase:
            clan.clip_grad_norm_()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs a round's figures when it has ended."""
        clan = self.clan
        if clan is not None:
            clan.settle()  # Lightning has moved the module's schedules.
        if clan is None or clan.phases.position.plan.index == self._num_rounds:
            return
        self._num_rounds = clan.phases.position.plan.index
        figures = common.figures(clan)
        # At once, whatever log_every_n_steps says: rounds end at steps of their own.
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
        # For callbacks that look at metrics, such as ModelCheckpoint(monitor="clan/validation_loss").
        pl_module.log_dict(figures, on_step=True, on_epoch=False, logger=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the run: writes the champion and the schedule that was found."""
        if self.clan is not None:
            self.summary = self.clan.finish()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets the clan go: until here, the Trainer may write a last checkpoint."""
        if stage == "fit":
            self._carrier.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends the run without a champion; a checkpoint that the Trainer writes now still holds the clan."""
        if self.clan is not None and self.summary is None:
            if self.clan.members.in_turns:
                self._carrier.release()  # the weights are a competitor's, in the middle of its turn
            self.clan.abandon()

    def state_dict(self) -> dict[str, Any]:
        """The clan, for the Trainer's checkpoint (a collective of all ranks)."""
        return self._carrier.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` returned; the clan is attached later."""
        self._carrier.load_state_dict(state_dict)
