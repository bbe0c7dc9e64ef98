"""Hyperparameter-divergent ensemble training (HDET; Cheng et al. 2026, arXiv 2604.24708): perturb, average, shift.

Members always share gradients and differ in their learning rates and other optimizer genes. A round (the paper's sync
interval) does the following for member r of N, and for each explored gene separately:

1. value_r = start x base x rho_r, with rho_r = 1 + alpha (pi(r) - (N-1)/2) / max((N-1)/2, 0.5) and a permutation pi
   per gene. ``start`` is the configured value. For a relative gene it is 1, a factor on the user's own schedule.
2. All take the mean of all members' parameters.
3. w = softmax(s), with s_r = (mean loss - loss_r) / sigma: a fitter member has a larger weight.
4. delta = sum_r w_r (rho_r - 1): above 0 if the higher values did better.
5. v <- beta v + (1 - beta) delta.
6. base <- base (1 + lambda v) + gamma (1 - base).

Signs and units. The paper's delta and v are in units of the learning rate. Here they are shares of the base, like the
ratios: base (1 + lambda v) equals the paper's base + lambda v. The paper's gamma replaces the decay of a schedule that
is switched off by then, hence its base (1 - gamma). Here the user's schedule still runs, and a second decay would be
one too many. So gamma draws the base back to 1, which is that schedule, from either side: the paper's
base (1 - gamma), plus gamma times 1. Both terms keep the base above 0 while lambda alpha < 1. Only
lambda alpha < gamma would keep it below gamma / (gamma - lambda alpha). The base is also clamped to the gene's bounds.

The published code departs from the paper in four points. This strategy follows the paper in them. Without adaptation,
members are still perturbed and averaged. Gamma cannot change its sign and let learning rates grow. Sigma is 0.1. A
member whose loss is not finite has weight 0 in every sum, also of parameters, and gets a fit member's optimizer state.

This strategy departs from both in two points. Losses are of the common validation window and not of each member's own
batches. Genes that cooperation does not express (for example, dropout) keep their configured values, because no
member's loss could show their effect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clantune_scale.core import mutation
from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.rounds import RoundPlan
from clantune_scale.core.strategies.base import Decision, Population, RunFacts, Strategy
from clantune_scale.core.strategies.lengths import phases, round_end
from clantune_scale.core.strategies.options import require
from clantune_scale.core.strategies.selection import survivors


@dataclass(frozen=True)
class HDETOptions:
    """Options of ``hdet``; the defaults are the paper's, except for ``pull``, which the paper does not have.

    Attributes:
        spread: alpha, the largest relative distance of a member from the base, above 0 and below 1.
        adapts: whether the base moves (the paper's auto-LR).
        warmup_steps: optimizer steps before it does, at least 0.
        temperature: sigma, the difference in loss that makes a weight e times another, above 0.
        momentum: beta, of the velocity, at least 0 and below 1.
        rate: lambda, the share of the velocity by which the base moves; at least 0, and with ``spread`` below 1.
        pull: gamma, the share of its distance to the user's schedule that the base loses per round, at
            least 0 and below 1.
    """

    spread: float = 1 / 9
    adapts: bool = True
    warmup_steps: int = 0
    temperature: float = 0.1
    momentum: float = 0.9
    rate: float = 0.5
    pull: float = 0.01

    def __post_init__(self) -> None:
        require(0 < self.spread < 1, "spread", self.spread, "above 0 and below 1")
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "at least 0")
        require(self.temperature > 0, "temperature", self.temperature, "above 0")
        require(0 <= self.momentum < 1, "momentum", self.momentum, "at least 0 and below 1")
        require(0 <= self.rate * self.spread < 1, "rate", self.rate, "at least 0 and, times spread, below 1")
        require(0 <= self.pull < 1, "pull", self.pull, "at least 0 and below 1")


class HDET(Strategy):
    """Perturbed genes, shared gradients, averaged weights.

    ``Population.memory`` holds ``base`` and ``velocity`` by gene, both relative to what the user configured.
    """

    Options = HDETOptions

    def __init__(self, facts: RunFacts, options: HDETOptions | None = None) -> None:
        super().__init__(facts)
        self.options = options or HDETOptions()
        # What is 0 at the start stays 0, whatever it is multiplied by.
        self._explored = [g for g in facts.genes if g.kind == "optimizer" and (g.scale != "linear" or g.initial > 0)]

    def plan(self, index: int, start_step: int) -> RoundPlan:
        """Only cooperation; the run's last round ends in an average like every other."""
        end = round_end(start_step, self.facts.round_length_steps, self.facts.total_steps)
        explores = tuple(gene.name for gene in self._explored)
        return RoundPlan(index, start_step, phases(end - start_step, 0, keeps=True), explores=explores)

    def init(self, start: Fitness) -> Population:
        """All members perturbed around the configured values."""
        names = [gene.name for gene in self._explored]
        return self._population({"base": dict.fromkeys(names, 1.0), "velocity": dict.fromkeys(names, 0.0)}, 0)

    def evolve(self, population: Population, plan: RoundPlan, fitness: Fitness) -> Decision:
        """Averages the members, and shifts each gene's base towards those that did better.

        Raises:
            EvaluationError: if no member's losses are finite; the message names the round.
        """
        finite = survivors(fitness, plan.index)
        weights = softmax_weights(fitness.mean.tolist(), self.options.temperature)
        memory = population.memory
        if self.options.adapts and plan.end_step > self.options.warmup_steps:
            memory = self._adapted(population, weights)
        average = tuple(1.0 / len(finite) if member in finite else 0.0 for member in range(fitness.num_members))
        donors = tuple(member if member in finite else finite[0] for member in range(fitness.num_members))
        moved = "; ".join(f"{gene.name} at {memory['base'][gene.name]:.4g} of its start" for gene in self._explored)
        reasons = tuple(
            f"averaged, weight {weight:.3f}; {moved}" if share else "not finite, takes the others' average"
            for share, weight in zip(average, weights, strict=True)
        )
        return Decision(self._population(memory, plan.index + 1), donors, mixing_weights=average, reasons=reasons)

    def _adapted(self, population: Population, weights: Sequence[float]) -> dict[str, Any]:
        """The memory after steps 4 to 6."""
        o, memory = self.options, population.memory
        base, velocity = dict(memory["base"]), dict(memory["velocity"])
        for gene in self._explored:
            centre = gene.decode(gene.times(gene.initial, base[gene.name]))
            delta = math.fsum(
                weight * (gene.ratio(genome.values[gene.name], centre) - 1.0)
                for weight, genome in zip(weights, population.genomes, strict=True)
            )
            velocity[gene.name] = o.momentum * velocity[gene.name] + (1.0 - o.momentum) * delta
            base[gene.name] = _shifted(gene, base[gene.name], velocity[gene.name], o)
        return {"base": base, "velocity": velocity}

    def resized(self, population: Population, sources: Sequence[int], plan: RoundPlan) -> Population:
        """Perturbs all members anew around the base, which belongs to the clan and not to a member."""
        return self._population(population.memory, plan.index)

    def _population(self, memory: Mapping[str, Any], round_: int) -> Population:
        """The members of a round, each gene's multipliers assigned by a permutation of its own."""
        size, initial = self.facts.population_size, Genome.initial(self.facts.genes)
        values = [dict(initial.values) for _ in range(size)]
        rho = multipliers(size, self.options.spread)
        for gene in self._explored:
            order = mutation.permutation(self.facts.seed, round_, mutation.CLAN, f"hdet:{gene.name}", count=size)
            for own, place in zip(values, order, strict=True):
                own[gene.name] = gene.decode(gene.times(gene.initial, memory["base"][gene.name] * rho[place]))
        return Population(tuple(Genome(own, initial.step_sizes) for own in values), memory)


def multipliers(population_size: int, spread: float) -> list[float]:
    """[members] rho, in ascending order and symmetric around 1 (the paper's eq. 1)."""
    middle = (population_size - 1) / 2
    return [1.0 + spread * (rank - middle) / max(middle, 0.5) for rank in range(population_size)]


def softmax_weights(losses: Sequence[float], temperature: float) -> list[float]:
    """[members] weights that sum to 1, heavier for lower losses; 0 for a loss that is not finite.

    The mean loss in s_r = (mean - loss_r) / sigma cancels in the softmax. The lowest loss replaces it, so that no
    exponential overflows.
    """
    lowest = min(loss for loss in losses if math.isfinite(loss))
    raised = [math.exp((lowest - loss) / temperature) if math.isfinite(loss) else 0.0 for loss in losses]
    total = math.fsum(raised)
    return [one / total for one in raised]


def _shifted(gene: Gene, base: float, velocity: float, options: HDETOptions) -> float:
    """The next base, moved by the gene's ``max_change`` at most and inside its bounds."""
    wanted = base * (1.0 + options.rate * velocity) + options.pull * (1.0 - base)
    before, after = (gene.times(gene.initial, factor) for factor in (base, wanted))
    capped = min(max(after, before - gene.max_change), before + gene.max_change)
    return gene.ratio(gene.decode(capped), gene.initial)
