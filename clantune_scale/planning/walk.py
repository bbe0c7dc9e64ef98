"""The phases of a whole run, as its strategy plans them."""

from __future__ import annotations

from dataclasses import dataclass

from clantune_scale.core.rounds import Phase, RoundClock
from clantune_scale.core.strategies import Strategy


@dataclass(frozen=True)
class Walk:
    """A run from its first step to its last.

    Attributes:
        phases: in order, each with the steps of it that the run takes. The run may end inside its last phase.
        num_rounds: rounds that begin.
        num_ended: rounds that end, each with an evaluation.
        num_evaluations: of the validation window by every member. There is one before the first round, one at each
            round's end, and one for the champion: two if averaged weights are kept to the end.
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
    """Plans the rounds of a run of ``num_steps`` optimizer steps. The strategy was built for that length."""
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
