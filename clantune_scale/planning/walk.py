"""The phases of a whole run, as its strategy plans them."""

from __future__ import annotations

from dataclasses import dataclass

from clantune_scale.core.rounds import Phase, RoundClock
from clantune_scale.core.strategies import Strategy


@dataclass(frozen=True)
class Walk:
    """From a run's first step to its last.

    Attributes:
        phases: in order, with the steps of each that the run takes; of its last one maybe not all.
        num_rounds: that begin.
        num_ended: that end, each with an evaluation.
        num_evaluations: of the validation window by every member: before the first round, at each one's end, and
            for the champion once or, where averaged weights are kept to the end, twice.
    """

    phases: tuple[tuple[Phase, int], ...]
    num_rounds: int
    num_ended: int
    num_evaluations: int

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return sum(taken for _, taken in self.phases)


def walk_through(strategy: Strategy, num_steps: int) -> Walk:
    """Walks through the rounds of a run of ``num_steps``, for which the strategy was built."""
    clock = RoundClock(strategy.plan)
    phases: list[tuple[Phase, int]] = []
    index = step = 0
    while step < num_steps:
        for phase in clock.round(index).phases:
            taken = min(phase.num_steps, num_steps - step)
            phases += [(phase, taken)] if taken else []
            step += taken
        index += 1
    ended = index if clock.round(index - 1).end_step == num_steps else index - 1
    has_averages = strategy.uses_ema and clock.at(num_steps).plan.uses_ema
    return Walk(tuple(phases), index, ended, 1 + ended + 1 + has_averages)
