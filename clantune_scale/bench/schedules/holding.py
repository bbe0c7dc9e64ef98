"""``clan`` with more respect for what was configured, to be measured against its own; ``LOG.md`` has the results.

Name it in a variants file as the strategy ``clantune_scale.bench.schedules.holding:HoldingClan``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from clantune_scale.bench.batched.model import constant
from clantune_scale.core.fitness import Fitness
from clantune_scale.core.rounds import RoundPlan
from clantune_scale.core.strategies.base import Decision, Population, RunFacts
from clantune_scale.core.strategies.clan.guard import Guard, paired
from clantune_scale.core.strategies.clan.parabola import Move
from clantune_scale.core.strategies.clan.plan import ClanOptions
from clantune_scale.core.strategies.clan.strategy import ClanStrategy
from clantune_scale.core.strategies.options import require

#: Why learning rates stay while the user's own schedule raises them: a higher one looks better then, whatever it is.
RISES = "the user's schedule rises"


@dataclass(frozen=True)
class HoldingOptions(ClanOptions):
    """Options of ``HoldingClan`` besides ``clan``'s.

    Attributes:
        hold: what stays while the user's own schedule rises: ``"search"``, learning rates in rounds of the line search;
            ``"all"``, the learning-rate trial is left out as well; ``"none"``, nothing.
        evidence: of the trial: a rise by x log units must have lowered the loss by this times x of the progress so
            far, or it is cut to what has. 0 takes every rise.
        prior: as in ``clan``, but as it was when these variants were measured.
    """

    hold: Literal["none", "search", "all"] = "search"
    evidence: float = 0.0
    prior: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.evidence >= 0, "evidence", self.evidence, "at least 0")


class HoldingClan(ClanStrategy):
    """``clan`` that knows the user's schedule.

    ``Population.memory`` has ``rises`` besides ``clan``'s own fields: whether the schedule rose in the last round.

    Attributes:
        schedule: factor on the learning rate after so many steps; the benchmark sets it.
    """

    Options = HoldingOptions

    options: HoldingOptions
    schedule: Callable[[int], float] = staticmethod(constant)

    def __init__(self, facts: RunFacts, options: HoldingOptions | None = None) -> None:
        super().__init__(facts, options or HoldingOptions())

    def evolve(self, population: Population, plan: RoundPlan, fitness: Fitness) -> Decision:
        decision = super().evolve(population, plan, fitness)
        # The next population was drawn before this was known, which only the trial's depends on.
        memory = {**decision.population.memory, "rises": self._rises(plan)}
        after = self._population(memory, self.plan(plan.index + 1, plan.end_step))
        return replace(decision, population=after)

    def _rises(self, plan: RoundPlan) -> bool:
        return self.schedule(plan.end_step) > self.schedule(plan.start_step)

    def _is_trial_round(self, plan: RoundPlan, memory: Mapping[str, Any]) -> bool:
        is_held = self.options.hold == "all" and memory.get("rises", False)
        return not is_held and super()._is_trial_round(plan, memory)

    def _moves(self, population: Population, plan: RoundPlan, fitness: Fitness) -> dict[str, Move]:
        moves = super()._moves(population, plan, fitness)
        if self._is_trial_round(plan, population.memory):
            return self._as_far_as_shown(moves, population.memory, fitness)
        if self.options.hold == "none" or not self._rises(plan):
            return moves
        rates = {gene.name for gene in self._learning_rates}
        return {name: Move(0.0, RISES) if name in rates else move for name, move in moves.items()}

    def _as_far_as_shown(self, moves: dict[str, Move], memory: Mapping[str, Any], fitness: Fitness) -> dict[str, Move]:
        """The trial's rise, cut to what its groups' losses show."""
        trial = self._planner.trial
        if not self.options.evidence or trial is None:
            return moves
        leaders = [trial.teams.index(team) for team in range(len(trial.offsets))]
        best = leaders[int(np.argmin(fitness.mean[leaders]))]
        gain, error = paired(fitness.losses[leaders[0]].tolist(), fitness.losses[best].tolist())
        if not math.isfinite(gain):
            return moves  # the clan's own rate diverged
        progress = Guard.from_memory(memory["guard"]).initial_loss - float(fitness.mean[best])
        most = max(0.0, gain - error) / (self.options.evidence * max(progress, 1e-12))
        return {
            name: Move(most, "trial, as far as its losses show") if move.change > most else move
            for name, move in moves.items()
        }
