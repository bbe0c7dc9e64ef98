"""The callback, which is enough.

It is told of the start of training, once model and optimizer are prepared and loaded, and of each checkpoint. It is not
told which Trainer calls it, so it looks for the Trainer among its callers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from clantune_scale.backends.torch.attach import attach
from clantune_scale.backends.torch.loop_clan import LoopClan
from clantune_scale.config.deepspeed_file import ConfigSource
from clantune_scale.config.schema import ClanConfig
from clantune_scale.errors import ClanError, ConfigError
from clantune_scale.integrations.accelerate import show_clipping
from clantune_scale.integrations.common import block_in_loop, figures, load, save
from clantune_scale.integrations.transformers.loop import TrainerLoop
from clantune_scale.integrations.transformers.settings import examples_of, find_block, refusals
from clantune_scale.results.champion import Summary
from clantune_scale.runtime.genome_application import Setter


class ClanCallback(TrainerCallback):
    """Tunes the schedule of a ``Trainer`` while it trains, with a clan whose members are on the line.

    From the Trainer come the evaluation data with their collator, the loss, the length of the run, batch, accumulation
    and clipping. Runs go below its ``output_dir``, and its checkpoints hold the clan: ``resume_from_checkpoint`` goes
    on with genome, round and schedule. Its reporters get the figures of each round.

    Args:
        config: the ``clantune`` block, a config that has one (a dict or a JSON file), or None: then the block in the
            config of ``--deepspeed``, else the file ``clan.json`` in the working directory.
        eval_data: map-style dataset on which members are compared, or the name of one of the Trainer's evaluation
            datasets; None takes the Trainer's ``eval_dataset``.
        gene_setters: by target name, a function that puts a gene's value into effect.

    Attributes:
        clan: while training lasts, and after it; None before.
        summary: of the finished run; None before.
    """

    def __init__(
        self,
        config: ConfigSource | None = None,
        *,
        eval_data: Dataset[Any] | str | None = None,
        gene_setters: Mapping[str, Setter] | None = None,
    ) -> None:
        self._config, self._eval_data, self._setters = config, eval_data, gene_setters
        self._trainer: Trainer | None = None
        self._num_rounds = self._num_steps = 0
        self._undo: list[Callable[[], None]] = []
        self.clan: LoopClan | None = None
        self.summary: Summary | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attaches the clan; loads it if the Trainer resumes from a checkpoint.

        Raises:
            ConfigError: if the Trainer's settings or the block cannot be used.
            CheckpointError: if the checkpoint holds no clan, or another one.
        """
        self._release()
        trainer, checkpoint = _caller()
        for reason in refusals(trainer):
            raise ConfigError(reason)
        block = block_in_loop(
            find_block(self._config, trainer),
            loop="Trainer",
            resume="call trainer.train(resume_from_checkpoint=...)",
            directory=Path(args.output_dir),
        )
        if block.total_steps not in (None, state.max_steps):
            raise ConfigError(
                f"clantune.total_steps is {block.total_steps}, and the Trainer takes {state.max_steps} steps. Leave it "
                f"out: the Trainer says how long the run is."
            )
        self._trainer, self.summary = trainer, None
        self.clan = clan = _attach(trainer, block, self._eval_data, self._setters, total_steps=state.max_steps)
        self._undo.append(show_clipping(trainer.accelerator, clan))
        if checkpoint is not None:
            load(clan, checkpoint)
        self._num_rounds = len(clan.progress.lineage)
        self._num_steps = clan.num_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reports a round that has ended.

        Raises:
            ClanError: if the Trainer's step did not come by the clan.
        """
        clan, trainer = self._running()
        clan.settle()
        if clan.num_steps == self._num_steps and not clan.backend.may_skip_steps:
            raise ClanError(
                f"Trainer has taken step {state.global_step}, and the clan did not see it: the optimizer or scheduler "
                f"that it was attached to at the start of training was replaced. Make them before train()."
            )
        self._num_steps = clan.num_steps
        if len(clan.progress.lineage) > self._num_rounds:
            self._num_rounds = len(clan.progress.lineage)
            # Trainer's log() clears the wish for its own figures of this step, which it has not written yet.
            should_log = control.should_log
            trainer.log(figures(clan))
            control.should_log = should_log

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the clan to the checkpoint that the Trainer has just written, if training can go on from it."""
        clan, trainer = self._running()
        if not args.save_only_model:
            save(clan, Path(trainer._get_output_dir(None)) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the run: writes the champion, its schedule and the record."""
        clan, _ = self._running()
        self.summary = clan.finish()
        self._release()

    def _running(self) -> tuple[LoopClan, Trainer]:
        assert self.clan is not None and self._trainer is not None, "Trainer begins training before anything else"
        return self.clan, self._trainer

    def _release(self) -> None:
        """Takes the hooks off; also those of a training that ended by an error."""
        while self._undo:
            self._undo.pop()()
        if self.clan is not None:
            self.clan.detach()
        self._trainer = None


def _caller() -> tuple[Trainer, Path | None]:
    """The Trainer whose training begins, and the checkpoint that it resumes from (None for a new run)."""
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals
        if isinstance(found.get("self"), Trainer) and "resume_from_checkpoint" in found:
            checkpoint = found["resume_from_checkpoint"]
            return found["self"], None if checkpoint is None else Path(checkpoint)
        frame = frame.f_back  # type: ignore[assignment]  # the outermost frame has none
    raise ClanError("ClanCallback works in transformers.Trainer, which did not call it. Pass it as a callback there.")


def _attach(
    trainer: Trainer,
    block: ClanConfig,
    eval_data: Dataset[Any] | str | None,
    setters: Mapping[str, Setter] | None,
    *,
    total_steps: int,
) -> LoopClan:
    loop = TrainerLoop(trainer)
    examples, collate = examples_of(trainer, eval_data)
    training = trainer.train_dataset
    return attach(
        trainer.model_wrapped,
        None if trainer.is_deepspeed_enabled else trainer.optimizer,
        loop.scheduler,
        config=block,
        eval_data=examples,
        collate_fn=collate,
        evaluate=loop.evaluate,
        gene_setters=setters,
        micro_batch_size=trainer._train_batch_size,
        accumulation=trainer.args.gradient_accumulation_steps,
        gradient_clipping=float(trainer.args.max_grad_norm or 0.0),
        scaler=trainer.accelerator.scaler,
        total_steps=total_steps,
        num_samples=len(training) if isinstance(training, Sized) else None,
        train_step=loop.train_step,
        watch=loop.watch,
    )
