"""What members are compared on: their losses on common examples, of the weights that train or of their averages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from clantune_scale.core.fitness import Fitness
from clantune_scale.runtime.validation_window import Evaluate, ValidationWindow
from clantune_scale.runtime.weight_averages import WeightEma

if TYPE_CHECKING:
    from clantune_scale.runtime.clan import Clan


class Measurement:
    """A member's part in measuring the clan.

    Args:
        clan: whose, with its backend, strategy and phases in place.
        window: the validation window that selection sees.
        evaluate: ``(engine, batch) -> loss`` in place of the model's own loss, or None.

    Attributes:
        averages: of this rank's masters, or None where the strategy keeps none.
    """

    def __init__(self, clan: Clan, window: ValidationWindow, evaluate: Evaluate | None) -> None:
        self._clan, self._window, self._evaluate = clan, window, evaluate
        backend = clan.backend
        self.uses_ema: WeightEma | None = None
        if clan.strategy.uses_ema:
            self.uses_ema = WeightEma(backend.masters, backend.refresh)

    @property
    def tokens_per_sample(self) -> int | None:
        """Token ids in a sample, or None where samples hold none."""
        return self._window.tokens_per_sample

    @property
    def seconds(self) -> float:
        """This rank's for its share of the window in the last evaluation."""
        return self._window.seconds

    @property
    def has_averages(self) -> bool:
        """Whether averaged weights are up to date: the strategy keeps them and this round measures on them."""
        return self.uses_ema is not None and self._clan.phases.position.plan.uses_ema

    def fitness(self, *, averaged: bool) -> Fitness:
        """The clan's losses on the common window, of averaged weights or of those that train.

        All ranks of the clan call it. Where the strategy keeps no averages, both are the weights that train.
        """
        with self.averaged_weights() if averaged else nullcontext():
            return self.on(self._window)

    def on(self, window: ValidationWindow) -> Fitness:
        """The clan's losses on a window, of the present weights; all ranks of the clan call it."""
        clan = self._clan
        with clan.phases.suspended():
            losses = window.losses(clan.backend, self._evaluate)
        return Fitness.from_losses(clan.world.replica_group.gather(losses))

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Inside, each member's model computes with its averaged weights, where the strategy keeps them."""
        with nullcontext() if self.uses_ema is None else self.uses_ema.in_place_of_weights():
            yield
