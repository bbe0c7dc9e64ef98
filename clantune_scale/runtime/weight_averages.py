"""Each member's exponential moving average of its weights, on which fitness is measured.

A single iterate's loss depends on progress and on the noise that the present learning rate leaves in the weights.
Selection on it can only lower the learning rate. The average's loss is nearly free of that noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from clantune_scale.core.line import averaging_weight, averaging_weights
from clantune_scale.core.rounds import Position


class WeightEma:
    """An average of the fp32 masters, sharded as they are.

    Args:
        masters: returns this rank's live fp32 masters, with the same shapes at every call.
        refresh: brings the weights that the model computes with up to date with the masters.
        every: steps from one update to the next, from a round's start (:func:`averaging_weights`).
        device: of the average; None for the masters' own.
    """

    def __init__(
        self,
        masters: Callable[[], Sequence[torch.Tensor]],
        refresh: Callable[[], None],
        *,
        every: int = 1,
        device: torch.device | None = None,
    ) -> None:
        self._masters, self._every, self._device = masters, every, device
        self._refresh = refresh
        self.tensors = [self._here(master).clone() for master in masters()]
        self._round: tuple[int, list[float]] = (-1, [])

    @torch.no_grad()
    def restart(self) -> None:
        """Sets the average to the present weights."""
        torch._foreach_copy_(self.tensors, [master.detach() for master in self._masters()])

    def after_step(self, done: Position) -> None:
        """Adds the weights after a step of a round, if the step has an update."""
        plan = done.plan
        if self._every == 1:
            self.update(done.step + 1, plan.ema_window_steps)
            return
        if self._round[0] != plan.index:
            self._round = (plan.index, averaging_weights(plan, every=self._every))
        weight = self._round[1][done.step - plan.start_step]
        if weight:
            self._move(weight)

    @torch.no_grad()
    def update(self, num_steps: int, window_steps: int) -> None:
        """Adds the weights after a step: ``average += (weights - average) / min(0.9 num_steps, window)``.

        Args:
            num_steps: optimizer steps done in the run; the window grows with it at first.
            window_steps: time constant of the average.
        """
        self._move(averaging_weight(num_steps, window_steps))

    @torch.no_grad()
    def _move(self, weight: float) -> None:
        torch._foreach_lerp_(self.tensors, [self._here(master) for master in self._masters()], weight)

    def _here(self, master: torch.Tensor) -> torch.Tensor:
        return master.detach() if self._device is None else master.detach().to(self._device)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Inside, the model computes with the averaged weights; on exit with its own, to the last bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for average, master in zip(self.tensors, self._masters(), strict=True):
            held = average.clone()
            average.copy_(master)
            master.copy_(held)
        self._refresh()
