"""Successive halving with warm start: a retired member's ranks join a member that goes on.

Successive halving (Karnin et al. 2013, Jamieson and Talwalkar 2016) stops the worse half of all runs at each rung, so
that promising runs get the budget. Here no member stops. Each member starts with values and gradients of its own. At
a rung's end the fittest go on from their states, and nothing is trained again. A retired member becomes a copy of one
of them and joins its team, which shares gradients and splits the data. So every team trains on a larger part of the
clan's batch from rung to rung, and no rank waits. The last team has all members. It is plain data parallelism with the
winner's genome.

A member on its own trains on a P-th of the clan's batch. The winner there suits small batches, so the halving should
be short.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from clantune_scale.core import mutation
from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.rounds import Phase, PhaseKind, RoundPlan
from clantune_scale.core.strategies.base import Decision, Population, RunFacts, Strategy
from clantune_scale.core.strategies.lengths import round_end
from clantune_scale.core.strategies.options import require
from clantune_scale.core.strategies.selection import survivors
from clantune_scale.errors import ClanError, ConfigError


@dataclass(frozen=True)
class HalvingOptions:
    """Options of ``halving``.

    Attributes:
        budgets: share of the run that each rung gets, in order; each above 0, together 1.
        survival: for each rung but the last, the share of its teams that goes on to the next, 0 to 1, and at
            least one team: 1 keeps every team whose loss is finite and does not rise, 0 only the fittest.
        factor: the first values lie within this factor of the configured ones, up or down (their odds do if
            the scale is logit); at least 1, or 0 for all of the gene's bounds. Genes on a
            linear scale take all of their bounds in any case.
        max_rise: a member retires at the next evaluation if its loss has risen by more than this share of its loss
            at the rung's start; above 0.
        decay: of learning rates over the last rung: ``"linear"`` bounds them by a line from the user's scheduled value
            at the rung's start to zero at the run's end; ``"none"`` leaves them to the user's schedule.
        num_reports: rounds (evaluations) in the last rung, if they are not shorter than the user's; at least 1.
    """

    budgets: tuple[float, ...] = (0.01, 0.03, 0.06, 0.9)
    survival: tuple[float, ...] = (1.0, 0.5, 0.0)
    factor: float = 16.0
    max_rise: float = 0.1
    decay: Literal["linear", "none"] = "linear"
    num_reports: int = 10

    def __post_init__(self) -> None:
        positive = bool(self.budgets) and min(self.budgets) > 0
        require(positive and math.isclose(sum(self.budgets), 1.0), "budgets", self.budgets, "above 0 and together 1")
        shares = all(0 <= share <= 1 for share in self.survival)
        wanted = f"one share (0 to 1) for each rung but the last, {len(self.budgets) - 1} in all"
        require(shares and len(self.survival) == len(self.budgets) - 1, "survival", self.survival, wanted)
        require(self.factor == 0 or self.factor >= 1, "factor", self.factor, "at least 1, or 0")
        require(self.max_rise > 0, "max_rise", self.max_rise, "above 0")
        require(self.num_reports >= 1, "num_reports", self.num_reports, "at least 1")


class Halving(Strategy):
    """Successive halving by teams.

    ``Population.memory`` holds ``num_entrants`` (teams at the rung's start) and ``reference`` (by member, its
    team's loss there; None if that was not finite).

    Raises:
        ConfigError: if the run's length is not known, or too short for the rungs.
    """

    Options = HalvingOptions

    def __init__(self, facts: RunFacts, options: HalvingOptions | None = None) -> None:
        super().__init__(facts)
        self.options = options or HalvingOptions()
        if facts.total_steps is None:
            raise ConfigError(
                "strategy 'halving' divides the run into rungs, and the run's length is not known. Set total_steps."
            )
        ends = [round(share * facts.total_steps) for share in accumulate(self.options.budgets)]
        if len(set(ends) | {0}) < len(ends) + 1:
            raise ConfigError(
                f"strategy 'halving' has {len(ends)} rungs that end after {ends} steps. "
                f"Each needs at least one step: raise total_steps, or the smallest of options.budgets."
            )
        self._ends = ends

    def plan(self, index: int, start_step: int) -> RoundPlan:
        """Competition throughout; ``Population.teams`` says who shares gradients with whom in it."""
        rung = bisect_right(self._ends, start_step)
        boundary = self._ends[rung] if rung < len(self._ends) else None
        length = self.facts.round_length_steps
        if rung == len(self._ends) - 1:
            length = max(length, math.ceil((self._ends[-1] - self._last_start) / self.options.num_reports))
        end = round_end(start_step, length, boundary)
        return RoundPlan(
            index,
            start_step,
            (Phase(PhaseKind.COMPETITIVE, end - start_step),),
            explores=tuple(gene.name for gene in self.facts.genes),
            evolves=end != self._ends[-1],
        )

    @property
    def decay_start_step(self) -> int | None:
        """The last rung's start, unless the decay is left to the user."""
        return self._last_start if self.options.decay == "linear" else None

    def init(self, start: Fitness) -> Population:
        """Each member in its own team: member 0 as the user configured it, others stratified over the genes' ranges.

        Each gene's range is cut into as many strata as there are other members, evenly in its scale. A permutation
        per gene assigns them to members (a Latin hypercube), so that every part of a range is tried.
        """
        size = self.facts.population_size
        initial = Genome.initial(self.facts.genes)
        values = [dict(initial.values) for _ in range(size)]
        for gene in self.facts.genes:
            name = f"halving:{gene.name}"
            strata = mutation.permutation(self.facts.seed, -1, mutation.CLAN, name, count=size - 1)
            low, high = _span(gene, self.options.factor)
            for member, stratum in enumerate(strata, start=1):
                place = (stratum + mutation.uniform(self.facts.seed, -1, member, name)) / (size - 1)
                values[member][gene.name] = gene.expressed(gene.decode(low + place * (high - low)))
        memory = {"num_entrants": size, "reference": [_finite(loss) for loss in start.mean]}
        genomes = tuple(Genome(own, initial.step_sizes) for own in values)
        return Population(genomes, memory, teams=tuple(range(size)))

    def resized(self, population: Population, sources: Sequence[int], plan: RoundPlan) -> Population:
        """Refused: the number of teams that leave at each step depends on the number at the start.

        Raises:
            ClanError: always.
        """
        raise ClanError(
            f"halving began with {len(population.genomes)} members and cannot go on with {len(sources)}: its rungs "
            f"follow from their number. Launch with {len(population.genomes)} members, or start a new run."
        )

    def evolve(self, population: Population, plan: RoundPlan, fitness: Fitness) -> Decision:
        """Retires failing teams and, at a rung's end, the less fit ones; their members join the teams that go on.

        Raises:
            EvaluationError: if no member's losses are finite; the message names the round.
        """
        teams = tuple(population.teams or range(fitness.num_members))
        leaders = leaders_of(teams, survivors(fitness, plan.index))
        reference = population.memory["reference"]
        failing = {team for team, leader in leaders[1:] if self._rises(fitness.mean[leader], reference[leader])}
        staying = [(team, leader) for team, leader in leaders if team not in failing]
        ends_rung = plan.end_step in self._ends[:-1]
        if ends_rung:
            staying = staying[: self._num_survivors(plan.end_step, population.memory["num_entrants"])]
        joined = join_teams(teams, [team for team, _ in staying])
        leader_of = dict(staying)
        donors = tuple(
            member if team == before and fitness.is_finite[member] else leader_of[team]
            for member, (team, before) in enumerate(zip(joined, teams, strict=True))
        )
        losses = [_finite(loss) for loss in fitness.mean] if ends_rung else reference
        memory = {
            "num_entrants": len(staying) if ends_rung else population.memory["num_entrants"],
            "reference": [losses[leader_of[team]] for team in joined],
        }
        genomes = tuple(population.genomes[leader_of[team]] for team in joined)
        reasons = tuple(
            _reason(before, team, before in failing, joined.count(team), is_finite=bool(finite))
            for before, team, finite in zip(teams, joined, fitness.is_finite, strict=True)
        )
        return Decision(Population(genomes, memory, joined), donors, reasons=reasons)

    @property
    def _last_start(self) -> int:
        """The step at which the last rung starts."""
        return self._ends[-2] if len(self._ends) > 1 else 0

    def _num_survivors(self, end_step: int, num_entrants: int) -> int:
        share = self.options.survival[self._ends.index(end_step)]
        return max(1, math.ceil(share * num_entrants - 1e-9))  # 0.3 x 10 is a hair above 3

    def _rises(self, loss: float, reference: float | None) -> bool:
        """Whether the loss has risen by more than ``max_rise`` since the rung's start."""
        return reference is not None and loss > reference + self.options.max_rise * abs(reference)


def _span(gene: Gene, factor: float) -> tuple[float, float]:
    """The range of the gene's first values, in scale units."""
    low, high = (gene.encode(bound) for bound in gene.bounds)
    if factor == 0 or gene.scale == "linear":
        return low, high
    centre, reach = gene.encode(gene.initial), math.log(factor)
    return max(low, centre - reach), min(high, centre + reach)


def _reason(before: int, team: int, rises: bool, size: int, *, is_finite: bool) -> str:
    if team == before:
        return f"goes on in team {team} of {size}" if is_finite else f"repaired by team {team}"
    why = "not finite" if not is_finite else "loss rises" if rises else "less fit"
    return f"retires ({why}), joins team {team} of {size}"


def _finite(loss: float) -> float | None:
    return float(loss) if math.isfinite(loss) else None


def leaders_of(teams: Sequence[int], order: Sequence[int]) -> list[tuple[int, int]]:
    """(team, its fittest member), from the fittest team on; a team without a finite loss is left out.

    Args:
        teams: by member.
        order: members whose loss is finite, from the fittest on.
    """
    leaders: dict[int, int] = {}
    for member in order:
        leaders.setdefault(teams[member], member)
    return list(leaders.items())


def join_teams(teams: tuple[int, ...], staying: Sequence[int]) -> tuple[int, ...]:
    """By member, its next team. A team that stays keeps its members; the others go one by one to the smallest team.

    Args:
        teams: by member.
        staying: the teams that go on, from the fittest on; the fitter of equally small ones gets the next member.
    """
    sizes = {team: teams.count(team) for team in staying}
    joined = list(teams)
    for member, team in enumerate(teams):
        if team not in sizes:
            joined[member] = min(staying, key=sizes.__getitem__)
            sizes[joined[member]] += 1
    return tuple(joined)
