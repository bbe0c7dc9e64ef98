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
from clantune_scale.runtime.elementwise import in_pieces, summing_dtype


class WeightEma:
    """An average of the weights, sharded as they are; in fp32 also if they are in 16 bits.

    Args:
        masters: returns this rank's live weights, with the same shapes at every call: fp32 masters if there are any.
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
        self.tensors = [self._like_average(master).clone() for master in masters()]
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
        masters = [master.detach() for master in self._masters()]
        if all(_are_alike(*pair) for pair in zip(self.tensors, masters, strict=True)):
            torch._foreach_lerp_(self.tensors, masters, weight)
            return
        # Each is copied on its way.
        for pair in zip(self.tensors, masters, strict=True):
            for average, master in in_pieces(*pair):
                average.lerp_(self._like_average(master), weight)

    def _like_average(self, master: torch.Tensor) -> torch.Tensor:
        return master.detach().to(self._device or master.device, summing_dtype(master))

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Inside, the model computes with the averaged weights; on exit with its own, to the last bit."""
        held = self._put_in()
        try:
            yield
        finally:
            self._put_back(held)

    @torch.no_grad()
    def _put_in(self) -> list[torch.Tensor | None]:
        """[masters] what each 16-bit one was. All others change places with their averages, which needs no memory."""
        held: list[torch.Tensor | None] = []
        for average, master in zip(self.tensors, self._masters(), strict=True):
            if average.dtype == master.dtype:
                _swap(average, master)
                held.append(None)
            else:
                held.append(master.detach().clone())
                master.copy_(average)
        self._refresh()
        return held

    @torch.no_grad()
    def _put_back(self, held: Sequence[torch.Tensor | None]) -> None:
        for average, master, own in zip(self.tensors, self._masters(), held, strict=True):
            if own is None:
                _swap(average, master)
            else:
                master.copy_(own)
        self._refresh()


def _are_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device


def _swap(one: torch.Tensor, other: torch.Tensor) -> None:
    for first, second in in_pieces(one, other):
        held = first.clone()
        first.copy_(second)
        second.copy_(held)
