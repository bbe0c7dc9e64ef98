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

# Attributes that an evaluation changes and training needs: data iterators, shapes of messages between stages, running
# totals. Some are set by the first batch only.
_RESTORED = (
    "data_iterator", "training_dataloader", "micro_batches", "is_data_parallel",
    "first_output_send", "first_gradient_send", "pipe_recv_buf", "grad_layer", "_grad_layer_buf", "meta_buffer",
    "pipe_partition_input_meta_cache", "pipe_partition_output_meta_cache", "pipe_partition_grad_meta_cache",
    "grad_partition_grad_layer_meta_cache", "eval_return_logits", "outputs", "fwd_outputs", "_compute_loss",
    "loss", "total_loss", "total_additional_losses",
)  # fmt: skip
_TIED = "tied_modules."


class PipelineBackend(DeepSpeedBackend):
    """A ``PipelineEngine`` that sees the member as its world.

    Gradients are shared as in any DeepSpeed engine. The pipeline's schedule sums tied gradients over the stages and
    then calls the hooked reductions.
    """

    _repeats = False

    def feed(self, loader: ClanDataLoader) -> None:
        """Makes ``engine.train_batch()`` read from ``loader``, epoch after epoch.

        A stage between the first and the last reads no data. Its loader counts the batches all the same, so that its
        saved state equals the others'.
        """
        engine = self.engine
        engine.set_dataloader(_Endless(loader))
        if engine.is_first_stage() or engine.is_last_stage():
            return
        total = engine._aggregate_total_loss

        def total_counted() -> torch.Tensor:
            for _ in range(0 if self._repeats else engine.micro_batches):
                loader.batch_sampler.consume()
            return total()

        self._undo.append(replace_method(engine, "_aggregate_total_loss", total_counted))

    @property
    def own_step(self) -> Callable[[list[tuple[tuple[Any, ...], dict[str, Any]]]], object] | None:
        """One call of ``train_batch``, which computes the loss itself."""
        return self._train_step

    def _train_step(self, batches: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> None:
        """One optimizer step on batches that :meth:`watch` showed; the engine's own loader stays where it is."""
        engine = self.engine
        found = {name: getattr(engine, name) for name in ("data_iterator", "training_dataloader")}
        self._repeats = True
        try:
            engine.train_batch(iter([args[0] for args, _ in batches]))
        finally:
            self._repeats = False
            for name, value in found.items():
                setattr(engine, name, value)

    def after_step(self, callback: Callable[[], None]) -> None:
        """Hooks ``engine.train_batch``, which broadcasts the loss after the step."""
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
        """Hooks the batches that the first and last stages load, and the step's mean loss, which every stage gets."""
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
        """Evaluation mode, in which ``engine.eval_batch`` takes one micro-batch and returns this replica's own loss.

        The ranks of a member evaluate different batches, and ``eval_batch`` would average their losses. On exit,
        all that training continues from is restored: data iterators, message shapes, running totals, layer seeds.
        """
        engine = self.engine
        found = {name: vars(engine)[name] for name in _RESTORED if name in vars(engine)}
        micro_offset, monitors = engine.module.micro_offset, engine.monitor.enabled
        engine.micro_batches, engine.is_data_parallel, engine.monitor.enabled = 1, False, False
        try:
            with super().evaluating():
                yield
        finally:
            for name in _RESTORED:
                if name in found:
                    setattr(engine, name, found[name])
                elif name in vars(engine):
                    delattr(engine, name)
            engine.module.micro_offset, engine.monitor.enabled = micro_offset, monitors

    def batch_loss(self, batch: Any, evaluate: Callable[[Any, Any], Any] | None) -> torch.Tensor:
        """[] the last stage's loss, on all stages. A batch is (inputs, labels), as for ``train_batch``."""
        # Stages agree on message shapes with the first message, and this batch may have other shapes.
        self.engine.reset_activation_shape()
        if evaluate is not None:
            return loss_of(evaluate(self.engine, batch))
        return self.engine.eval_batch(iter([batch]), num_micro_batches=1)

    def counters(self) -> dict[str, int]:
        """DeepSpeed's counters, and the module's number of forward passes, which seeds its layers."""
        return super().counters() | {"micro_offset": self.engine.module.micro_offset}

    def load_counters(self, counters: Mapping[str, int]) -> None:
        rest = dict(counters)
        self.engine.module.micro_offset = rest.pop("micro_offset")
        super().load_counters(rest)

    def full_weights(self) -> dict[str, torch.Tensor] | None:
        """This stage's weights, with global layer numbers. A tied weight is on the first of its stages only."""
        found = super().full_weights()
        return None if found is None else {self._name(name): t for name, t in found.items() if self._is_mine(name)}

    def _is_mine(self, name: str) -> bool:
        """Whether this stage reports the weight: it is not a later stage's copy of a tied weight."""
        tied = self._later_copy(name)
        return tied is None or name.split(".", 2)[2] not in tied["weight_attr"]

    def _name(self, name: str) -> str:
        """The weight's name in the whole model.

        An untied weight of a tied module on a later stage gets the number of the module's first layer on that stage.
        """
        if self._later_copy(name) is None:
            return name
        _, key, rest = name.split(".", 2)
        module = self.engine.module
        stage = range(module._local_start, module._local_stop)
        layer = next(index for index in stage if getattr(module._layer_specs[index], "key", None) == key)
        return f"{layer}.{rest}"

    def _later_copy(self, name: str) -> dict[str, Any] | None:
        """DeepSpeed's record of a tied module, if this stage is not the first that has it; None otherwise."""
        tied = self.engine.module.tied_comms.get(name.split(".")[1]) if name.startswith(_TIED) else None
        return tied if tied is not None and tied["ranks"][0] != self.engine.global_rank else None


class _Endless:
    """A loader's batches, epoch after epoch."""

    def __init__(self, loader: ClanDataLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(repeat(self.loader))
