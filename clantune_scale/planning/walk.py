"""The phases of a whole run, as its strategy plans them."""

from __future__ import annotations

from dataclasses import dataclass

from clantune_scale.core.rounds import Phase, RoundClock, RoundPlan
from clantune_scale.core.strategies import Strategy


@dataclass(frozen=True)
class Walk:
    """A run from its first step to its last.

    Attributes:
        phases: in order, each with the steps of it that the run takes. The run may end inside its last phase.
        rounds: plans of the rounds that begin.
        num_ended: rounds that end, each with an evaluation.
        num_champions: evaluations of the champion: one, or two if averaged weights are kept to the end.
    """

    phases: tuple[tuple[Phase, int], ...]
    rounds: tuple[RoundPlan, ...]
    num_ended: int
    num_champions: int

    @property
    def num_rounds(self) -> int:
        """Rounds that begin."""
        return len(self.rounds)

    @property
    def ended(self) -> tuple[RoundPlan, ...]:
        """Plans of the rounds that end."""
        return self.rounds[: self.num_ended]

    @property
    def num_evaluations(self) -> int:
        """Times at which losses are measured: before the first round, at each one's end, and for the champion."""
        return 1 + self.num_ended + self.num_champions

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        return sum(taken for _, taken in self.phases)


def walk_through(strategy: Strategy, num_steps: int) -> Walk:
    """Plans the rounds of a run of ``num_steps`` optimizer steps. The strategy was built for that length."""
    clock = RoundClock(strategy.plan)
    phases: list[tuple[Phase, int]] = []
    rounds: list[RoundPlan] = []
    step = 0
    while step < num_steps:
        rounds.append(clock.round(len(rounds)))
        for phase in rounds[-1].phases:
            taken = min(phase.num_steps, num_steps - step)
            phases += [(phase, taken)] if taken else []
            step += taken
    num_ended = len(rounds) if rounds[-1].end_step == num_steps else len(rounds) - 1
    has_averages = strategy.uses_ema and clock.at(num_steps).plan.uses_ema
    return Walk(tuple(phases), tuple(rounds), num_ended, 1 + has_averages)
