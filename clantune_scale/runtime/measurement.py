"""Fitness: the members' losses on common examples, with the weights that train or with their moving averages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch

from clantune_scale.core.fitness import Fitness
from clantune_scale.distributed.groups import ReplicaGroup
from clantune_scale.runtime.engine_protocol import MeasuredEngine, ValidationGradients
from clantune_scale.runtime.phases import PhaseManager
from clantune_scale.runtime.validation_window import Evaluate, ValidationWindow
from clantune_scale.runtime.weight_averages import WeightEma


class Measurement:
    """A member's part in measuring the clan.

    Args:
        window: the validation window that selection sees.
        evaluate: ``(engine, batch) -> loss`` in place of the model's own loss, or None.
        backend: the member's engine.
        phases: suspends gradient sharing during an evaluation.
        replica_group: this rank's peers.
        uses_ema: whether the strategy averages weights.
        average_every, average_device: see :class:`WeightEma`.

    Attributes:
        ema: the moving average of this rank's fp32 weights, or None if the strategy uses none.
    """

    def __init__(
        self,
        window: ValidationWindow,
        evaluate: Evaluate | None,
        *,
        backend: MeasuredEngine,
        phases: PhaseManager,
        replica_group: ReplicaGroup,
        uses_ema: bool,
        average_every: int = 1,
        average_device: torch.device | None = None,
    ) -> None:
        self._window, self._evaluate = window, evaluate
        self._backend, self._phases, self._replica_group = backend, phases, replica_group
        self.ema = None
        if uses_ema:
            self.ema = WeightEma(backend.masters, backend.refresh, every=average_every, device=average_device)

    @property
    def tokens_per_sample(self) -> int | None:
        """Token ids in a sample, or None if samples hold none."""
        return self._window.tokens_per_sample

    @property
    def seconds(self) -> float:
        """This rank's time for its share of the window in the last evaluation."""
        return self._window.seconds

    @property
    def has_averages(self) -> bool:
        """Whether averaged weights are up to date: the strategy uses them and measures this round on them."""
        return self.ema is not None and self._phases.position.plan.uses_ema

    def fitness(self, *, averaged: bool) -> Fitness:
        """The clan's losses on the common window; all ranks of the clan call it.

        Args:
            averaged: whether to measure the averaged weights, if the strategy uses them.
        """
        with self.weights(averaged=averaged):
            return self.on(self._window)

    def on(self, window: ValidationWindow) -> Fitness:
        """The clan's losses on a window, with the present weights; all ranks of the clan call it."""
        return Fitness.from_losses(self._replica_group.gather(self.losses(window)))

    def losses(self, window: ValidationWindow | None = None) -> np.ndarray:
        """[batches] of the present weights, on this rank's member only; a collective of that member.

        Args:
            window: the one that selection sees if None.
        """
        with self._phases.suspended():
            return (window or self._window).losses(self._backend, self._evaluate)

    def slopes(self, of_gradient: Callable[[Sequence[torch.Tensor | None]], torch.Tensor]) -> np.ndarray:
        """[batches, groups] of the present weights, on all ranks alike; a collective of the member.

        Args:
            of_gradient: [masters] a gradient to [groups], each a sum over this rank's elements.
        """
        gradients = self._gradients()
        with self._phases.suspended():
            rows = self._window.each(
                self._backend, lambda batch: of_gradient(gradients.of_batch(batch, self._evaluate))
            )
        table: np.ndarray = gradients.joined(torch.stack(rows)).cpu().numpy()
        return table

    def require_gradients(self) -> None:
        """Tries a gradient of the window's first batch (a collective of the member).

        Raises:
            EvaluationError: if the loss has none.
        """
        gradients = self._gradients()
        with self._phases.suspended():
            self._window.each(self._backend, lambda batch: gradients.of_batch(batch, self._evaluate), at_most=1)

    def _gradients(self) -> ValidationGradients:
        gradients = self._backend.validation_gradients()
        assert not isinstance(gradients, str), f"refused before the first step: {gradients}"
        return gradients

    def weights(self, *, averaged: bool) -> AbstractContextManager[None]:
        """Inside, the model computes with its averaged weights, or with those that its optimizer wants evaluated."""
        return self.averaged_weights() if averaged and self.ema is not None else self._backend.inference_weights()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, each member's model computes with its averaged weights, if the strategy uses them."""
        with nullcontext() if self.ema is None else self.ema.in_place_of_weights():
            yield
