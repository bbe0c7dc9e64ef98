"""Loops over optimizer steps: the micro-batches of each, and the turns of members on the line between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from clantune_scale.errors import ClanError

#: Hooks a loop so that it shows the clan ``on_batch(args, kwargs)`` for each micro-batch that is trained on, and
#: ``on_loss(loss)``; returns what takes the hooks off.
Watch = Callable[[Callable[[tuple[Any, ...], dict[str, Any]], None], Callable[[Any], None]], Callable[[], None]]


class Steps(Protocol):
    """What a loop asks of an engine.

    Attributes:
        num_steps: optimizer steps done.
        accumulation: micro-batches of the next step.
    """

    @property
    def num_steps(self) -> int: ...

    @property
    def accumulation(self) -> int: ...

    @property
    def may_skip_steps(self) -> bool:
        """Whether a step may update nothing, because scaled gradients overflowed."""

    def settle(self) -> None:
        """Ends a step that the loop has left, and follows a checkpoint that it has loaded, if that is due."""

    def exchanging(self, is_last: bool) -> AbstractContextManager[None]:
        """The context of one micro-batch's forward and backward. Gradients cross ranks in the step's last one only."""


class Step:
    """One optimizer step's micro-batches: as many as the accumulation in effect says, ``len(step)``.

    Gradients cross ranks only in the last one. Divide each loss by ``len(step)``.
    """

    def __init__(
        self, engine: Steps, batches: Iterator[Any], *, size: int, on_batch: Callable[[Any], None] | None
    ) -> None:
        self._engine, self._batches, self._size, self._on_batch = engine, batches, size, on_batch

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Any]:
        for number in range(self._size):
            batch = next(self._batches)
            if self._on_batch is not None:
                self._on_batch(batch)
            with self._engine.exchanging(number == self._size - 1):
                yield batch


def new_step(engine: Steps, batches: Iterator[Any], on_batch: Callable[[Any], None]) -> Iterator[Step]:
    """Yields one step over new batches.

    Args:
        engine: that trains.
        batches: endless.
        on_batch: is shown each batch before it is used.

    Raises:
        ClanError: if the loop's body took no optimizer step.
    """
    engine.settle()
    yield from _checked(engine, Step(engine, batches, size=engine.accumulation, on_batch=on_batch))


def repeated_step(engine: Steps, batches: list[Any]) -> Iterator[Step]:
    """Yields one step over batches that were used before; raises as :func:`new_step`."""
    yield from _checked(engine, Step(engine, iter(batches), size=len(batches), on_batch=None))


def _checked(engine: Steps, step: Step) -> Iterator[Step]:
    before = engine.num_steps
    yield step
    engine.settle()
    if engine.num_steps == before and not engine.may_skip_steps:
        raise ClanError(
            f"no optimizer step was taken after {before}. Inside `for step in clan.steps(loader)`, call "
            f"optimizer.step() once (and scheduler.step() after it, if attach() was given a scheduler)."
        )


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Batches of one pass over ``loader`` after the other.

    Raises:
        ClanError: if a pass gives none.
    """
    while True:
        is_empty = True
        for batch in loader:
            is_empty = False
            yield batch
        if is_empty:
            raise ClanError("the loader gives no batch. Check its dataset's length against the batch size.")
