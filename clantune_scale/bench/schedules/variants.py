"""Other rules for the move of ``clan``'s centre, to be measured against its own; ``LOG.md`` has the results.

Name it in a variants file as the strategy ``clantune_scale.bench.schedules.variants:ClanVariant``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from clantune_scale.core.fitness import Fitness
from clantune_scale.core.rounds import RoundPlan
from clantune_scale.core.strategies.base import Decision, Population, RunFacts
from clantune_scale.core.strategies.clan.least_squares import least_squares
from clantune_scale.core.strategies.clan.parabola import Move, minimum_along_the_line
from clantune_scale.core.strategies.clan.perturbations import regressors
from clantune_scale.core.strategies.clan.plan import ClanOptions
from clantune_scale.core.strategies.clan.strategy import ClanStrategy

#: Trust region: radius times this after a move on in the same direction, and after a change of sign.
GROW, SHRINK = 1.3, 0.5


@dataclass(frozen=True)
class VariantOptions(ClanOptions):
    """Options of ``ClanVariant`` besides ``clan``'s.

    Attributes:
        model: what is quadratic: the loss over log lr (``"log"``, as in ``clan``), or over the length of the
            common displacement, which is in proportion to lr (``"line"``); ``"nearer"`` takes the smaller
            move of the two, the line's upward and the parabola's in log lr downward.
        noise: standard errors, over validation batches, that are added to the curvature before the step
            is taken; also shrinks slopes that are small against theirs. 0 trusts the fit.
        trusts: whether the largest change shrinks after a change of sign, and grows back after none.
        smoothing: share of the last change in the next one, 0 to 1; a first change is taken in full.
        max_up, max_down: largest change upward and downward, in place of the gene's own; 0 keeps that.
        churn: share of the clan, its weakest members, who take the fittest one's state after a round; 1 as in
            ``clan``, 0 for members that all keep their own.
        trial_cost, start_factor, averaging_window, prior: as in ``clan``, but as they were when the log's variants were
            measured, before there was a learning-rate trial.
    """

    model: Literal["log", "line", "nearer"] = "log"
    noise: float = 0.0
    trusts: bool = False
    smoothing: float = 0.0
    max_up: float = 0.0
    max_down: float = 0.0
    churn: float = 1.0
    trial_cost: float = 0.0
    start_factor: float = 1.0
    averaging_window: float = 0.7
    prior: float = 1.0


class ClanVariant(ClanStrategy):
    """``clan`` with another way from losses to moves.

    ``Population.memory`` has ``radius`` besides ``clan``'s own fields: by gene, the largest change that is
    trusted, as a share of the gene's own.
    """

    Options = VariantOptions

    options: VariantOptions

    def __init__(self, facts: RunFacts, options: VariantOptions | None = None) -> None:
        super().__init__(facts, options or VariantOptions())

    def evolve(self, population: Population, plan: RoundPlan, fitness: Fitness) -> Decision:
        decision = super().evolve(population, plan, fitness)
        if self.options.churn < 1 and not decision.rolls_back:
            decision = replace(decision, donors=_fewer(decision.donors, fitness, self.options.churn))
        memory = decision.population.memory
        radius = _radii(population.memory, memory) if self.options.trusts else {}
        return replace(decision, population=replace(decision.population, memory={**memory, "radius": radius}))

    def _moves(self, population: Population, plan: RoundPlan, fitness: Fitness) -> dict[str, Move]:
        if not fitness.is_finite.all():
            return super()._moves(population, plan, fitness)
        genes = [self.facts.gene(name) for name in plan.explores]
        memory = population.memory
        offsets = np.array(
            [
                [gene.encode(own.values[gene.name]) - memory["centre"][gene.name] for gene in genes]
                for own in population.genomes
            ]
        )
        fits = _fits(offsets, fitness.losses)
        if fits is None:
            return super()._moves(population, plan, fitness)
        moves = {}
        for index, gene in enumerate(genes):
            cap = gene.max_change * memory.get("radius", {}).get(gene.name, 1.0)
            change = self._change(fits[:, index], fits[:, len(genes) + index], cap)
            last = memory["moves"].get(gene.name)
            if last is not None and last["why"] != "guard":
                change = (1 - self.options.smoothing) * change + self.options.smoothing * last["change"]
            moves[gene.name] = Move(change, self.options.model)
        return moves

    def _change(self, slopes: np.ndarray, curvatures: np.ndarray, cap: float) -> float:
        """The move, from a fit per validation batch ([batches] each): f = a + slope x + curvature x^2."""
        slope, curvature = float(slopes.mean()), float(curvatures.mean())
        if self.options.noise:
            slope_error, error = (float(fit.std(ddof=1)) / math.sqrt(len(fit)) for fit in (slopes, curvatures))
            slope *= slope**2 / (slope**2 + (self.options.noise * slope_error) ** 2 + 1e-300)
            curvature = max(curvature, 0.0) + self.options.noise * error
        up, down = min(self.options.max_up or cap, cap), min(self.options.max_down or cap, cap)
        minima = {"log": _minimum(slope, curvature), "line": minimum_along_the_line(slope, curvature)}
        change = minima.get(self.options.model, min(minima.values(), key=abs))
        return min(max(change, -down), up)


def _fewer(donors: Sequence[int], fitness: Fitness, churn: float) -> tuple[int, ...]:
    """``donors``, but only a share of the clan, its weakest, takes another's state."""
    weakest = fitness.ranking[fitness.num_members - round(churn * fitness.num_members) :]
    return tuple(donor if member in weakest else member for member, donor in enumerate(donors))


def _minimum(slope: float, curvature: float) -> float:
    """Of a parabola in log lr; endlessly far downhill if it has none."""
    return -slope / (2 * curvature) if curvature > 0 else -math.copysign(math.inf, slope)


def _fits(offsets: np.ndarray, losses: np.ndarray) -> np.ndarray | None:
    """[batches, 2 x genes]: slopes and curvatures of each validation batch; None if they are not determined."""
    columns = regressors(offsets, quadratic=True)
    fits = [least_squares(columns, (batch - batch[0]).tolist()) for batch in losses.T]
    return None if any(fit is None for fit in fits) else np.array(fits)[:, 1:]


def _radii(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, float]:
    """By gene, the share of its largest change that the next move may be."""
    radii = dict(before.get("radius", {}))
    for name, move in after["moves"].items():
        last = before["moves"].get(name, {"change": 0.0})["change"]
        turned = last * move["change"] < 0
        radii[name] = min(1.0, radii.get(name, 1.0) * (SHRINK if turned else GROW))
    return radii
