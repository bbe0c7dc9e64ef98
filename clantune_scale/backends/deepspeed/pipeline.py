"""Members that are pipelines: DeepSpeed's pipeline engine, through ``train_batch`` and ``eval_batch``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, repeat
from typing import Any

import torch

from clantune_scale.backends.deepspeed.engine import DeepSpeedBackend
from clantune_scale.data.sampler import ClanDataLoader
from clantune_scale.gradients.hooks import replace_method
from clantune_scale.runtime.validation_window import loss_of

# What an evaluation changes and training goes on from: where data comes from, what was agreed on the shapes of
# messages between stages, running totals. Some are set by the first batch only.
_KEPT = (
    "data_iterator", "training_dataloader", "micro_batches", "is_data_parallel",
    "first_output_send", "first_gradient_send", "pipe_recv_buf", "grad_layer", "_grad_layer_buf", "meta_buffer",
    "pipe_partition_input_meta_cache", "pipe_partition_output_meta_cache", "pipe_partition_grad_meta_cache",
    "grad_partition_grad_layer_meta_cache", "eval_return_logits", "outputs", "fwd_outputs", "_compute_loss",
    "loss", "total_loss", "total_additional_losses",
)  # fmt: skip
_TIED = "tied_modules."


class PipelineBackend(DeepSpeedBackend):
    """A ``PipelineEngine`` that sees the member as its world.

    Gradients are shared as in any DeepSpeed engine: the pipeline's own schedule calls the reductions that are
    hooked, after it has summed tied gradients over the stages.
    """

    def feed(self, loader: ClanDataLoader) -> None:
        """Makes ``engine.train_batch()`` read from ``loader``, epoch after epoch.

        A stage between the first and the last reads nothing; its loader counts along, so that what is saved of it
        is what the others have.
        """
        engine = self.engine
        engine.set_dataloader(_Endless(loader))
        if engine.is_first_stage() or engine.is_last_stage():
            return
        total = engine._aggregate_total_loss

        def total_counted() -> torch.Tensor:
            for _ in range(engine.micro_batches):
                loader.batch_sampler.consume()
            return total()

        self._undo.append(replace_method(engine, "_aggregate_total_loss", total_counted))

    def after_step(self, callback: Callable[[], None]) -> None:
        """Hooks ``engine.train_batch``: the step is its last instruction, and the loss is told after it."""
        engine = self.engine
        train_batch = engine.train_batch

        def train_batch_then_call(*args: Any, **kwargs: Any) -> Any:
            before = engine.global_steps
            loss = train_batch(*args, **kwargs)
            if engine.global_steps > before:
                callback()
            return loss

        self._undo.append(replace_method(engine, "train_batch", train_batch_then_call))

    def watch(self, on_batch: Callable[[tuple, dict], None], on_loss: Callable[[torch.Tensor], None]) -> None:
        """Hooks what the first and the last stage load, and the mean loss of a step, which every stage is told."""
        engine = self.engine
        next_batch, total = engine._next_batch, engine._aggregate_total_loss

        def next_batch_watched() -> Any:
            batch = next_batch()
            if engine.module.training and batch is not None:
                on_batch((batch,), {})
            return batch

        def total_watched() -> torch.Tensor:
            loss = total()
            on_loss(loss)
            return loss

        self._undo += [
            replace_method(engine, "_next_batch", next_batch_watched),
            replace_method(engine, "_aggregate_total_loss", total_watched),
        ]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode; inside, ``engine.eval_batch`` takes one micro-batch and tells this replica's own loss.

        Ranks of a member evaluate different batches, which ``eval_batch`` would average. Afterwards training goes on
        from where it was: data iterators, shapes of messages, running totals and layer seeds.
        """
        engine = self.engine
        kept = {name: vars(engine)[name] for name in _KEPT if name in vars(engine)}
        micro_offset, monitors = engine.module.micro_offset, engine.monitor.enabled
        engine.micro_batches, engine.is_data_parallel, engine.monitor.enabled = 1, False, False
        try:
            with super().evaluating():
                yield
        finally:
            for name in _KEPT:
                if name in kept:
                    setattr(engine, name, kept[name])
                elif name in vars(engine):
                    delattr(engine, name)
            engine.module.micro_offset, engine.monitor.enabled = micro_offset, monitors

    def batch_loss(self, batch: Any, evaluate: Callable[[Any, Any], Any] | None) -> torch.Tensor:
        """The last stage's loss, told to all stages: a batch is (inputs, labels), as for ``train_batch``."""
        # Stages agree on the shapes of what they send at the first message: this batch may have others.
        self.engine.reset_activation_shape()
        if evaluate is not None:
            return loss_of(evaluate(self.engine, batch))
        return self.engine.eval_batch(iter([batch]), num_micro_batches=1)

    def counters(self) -> dict[str, int]:
        """DeepSpeed's own, and the module's count of forward passes, from which it seeds its layers."""
        return super().counters() | {"micro_offset": self.engine.module.micro_offset}

    def load_counters(self, counters: Mapping[str, int]) -> None:
        rest = dict(counters)
        self.engine.module.micro_offset = rest.pop("micro_offset")
        super().load_counters(rest)

    def full_weights(self) -> dict[str, torch.Tensor] | None:
        """This stage's, layers by their global number; a tied weight on the first of its stages alone."""
        found = super().full_weights()
        return None if found is None else {self._name(name): t for name, t in found.items() if self._is_mine(name)}

    def _is_mine(self, name: str) -> bool:
        """Whether a later stage's copy of a tied weight is not meant."""
        return not self._is_later_copy(name) or name.split(".", 2)[2] not in self._tied(name)["weight_attr"]

    def _name(self, name: str) -> str:
        """What a tied module keeps to itself on a later stage goes by the number of its first layer there."""
        if not self._is_later_copy(name):
            return name
        _, key, rest = name.split(".", 2)
        module = self.engine.module
        stage = range(module._local_start, module._local_stop)
        layer = next(index for index in stage if getattr(module._layer_specs[index], "key", None) == key)
        return f"{layer}.{rest}"

    def _is_later_copy(self, name: str) -> bool:
        tied = self._tied(name)
        return tied is not None and tied["ranks"][0] != self.engine.global_rank

    def _tied(self, name: str) -> dict[str, Any] | None:
        """What DeepSpeed knows of a tied module that other stages have too."""
        return self.engine.module.tied_comms.get(name.split(".")[1]) if name.startswith(_TIED) else None


class _Endless:
    """A loader's batches, epoch after epoch."""

    def __init__(self, loader: ClanDataLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(repeat(self.loader))
