"""Each member's exponential moving average of its weights, on which fitness is measured.

A single iterate's loss depends on progress and on the noise that the present learning rate leaves in the weights.
Selection on it can only lower the learning rate. The average's loss is nearly free of that noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch


class WeightEma:
    """An average of the fp32 masters, sharded as they are.

    Args:
        masters: returns this rank's live fp32 masters, with the same shapes at every call.
        refresh: brings the weights that the model computes with up to date with the masters.
    """

    def __init__(self, masters: Callable[[], Sequence[torch.Tensor]], refresh: Callable[[], None]) -> None:
        self._masters = masters
        self._refresh = refresh
        self.tensors = [master.detach().clone() for master in masters()]

    @torch.no_grad()
    def restart(self) -> None:
        """Sets the average to the present weights."""
        torch._foreach_copy_(self.tensors, [master.detach() for master in self._masters()])

    @torch.no_grad()
    def update(self, num_steps: int, window_steps: int) -> None:
        """Adds the weights after a step: ``average += (weights - average) / min(0.9 num_steps, window)``.

        Args:
            num_steps: optimizer steps done in the run; the window grows with it at first.
            window_steps: time constant of the average.
        """
        weight = min(1.0, 1.0 / max(1.0, min(0.9 * num_steps, window_steps)))
        torch._foreach_lerp_(self.tensors, [master.detach() for master in self._masters()], weight)

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
