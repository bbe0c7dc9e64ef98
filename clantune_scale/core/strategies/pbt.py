"""Population-based training (Jaderberg et al. 2017): members train on their own; the weak copy the strong and explore.

The rules are DeepMind's and Ray Tune's (``ray.tune.schedulers.pbt``). Equal scores and equal draws give Ray Tune's
decisions. These points differ:

- Rounds are synchronous.
- Members see the same data, so that they can be compared.
- Values stay inside their genes' bounds. Ray Tune's may leave them.
- The odds are perturbed if a gene's scale is logit.
- An integer gene moves by at least one.
- A member whose loss is not finite is always replaced. Ray Tune keeps it.

With ``full_batch`` every member trains on as much data as the clan would. This is PBT as published, and it costs
``population_size`` times as much as the plain run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from clantune_scale.core import mutation
from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.rounds import Phase, PhaseKind, RoundPlan
from clantune_scale.core.strategies.base import Decision, Population, RunFacts, Strategy
from clantune_scale.core.strategies.lengths import round_end
from clantune_scale.core.strategies.options import require
from clantune_scale.core.strategies.selection import root, survivors


@dataclass(frozen=True)
class PBTOptions:
    """Options of ``pbt``; the defaults are Ray Tune's.

    Attributes:
        exploit: ``"truncation"`` (the weakest quantile copies random members of the fittest) or ``"ttest"``
            (each member draws a random other, and copies it if it is significantly better).
        quantile: truncation: share of the clan that is replaced, above 0 and at most 0.5.
        p_value: ttest: largest two-sided p-value of Welch's test that lets a member copy, between 0 and 1.
        resample_probability: probability that an explored gene is drawn anew over its bounds, 0 to 1.
        factors: otherwise one of these multiplies it; each above 0.
        start: first values of all members but the first: ``"explored"`` from the configured ones, like a copy's;
            ``"resampled"`` over the bounds, like the paper's from its priors; or ``"equal"``.
        full_batch: whether each member trains on the clan's whole batch, or on its own share of it.
    """

    exploit: Literal["truncation", "ttest"] = "truncation"
    quantile: float = 0.25
    p_value: float = 0.05
    resample_probability: float = 0.25
    factors: tuple[float, ...] = (1.2, 0.8)
    start: Literal["explored", "resampled", "equal"] = "explored"
    full_batch: bool = True

    def __post_init__(self) -> None:
        require(0 < self.quantile <= 0.5, "quantile", self.quantile, "above 0 and at most 0.5")
        require(0 < self.p_value < 1, "p_value", self.p_value, "between 0 and 1")
        require(0 <= self.resample_probability <= 1, "resample_probability", self.resample_probability, "0 to 1")
        require(bool(self.factors) and min(self.factors) > 0, "factors", self.factors, "a list of numbers above 0")


class PBT(Strategy):
    """Population-based training."""

    Options = PBTOptions

    def __init__(self, facts: RunFacts, options: PBTOptions | None = None) -> None:
        super().__init__(facts)
        self.options = options or PBTOptions()

    def plan(self, index: int, start_step: int) -> RoundPlan:
        end = round_end(start_step, self.facts.round_length_steps, self.facts.total_steps)
        factor = self.facts.population_size if self.options.full_batch else 1
        phase = Phase(PhaseKind.COMPETITIVE, end - start_step, batch_factor=factor)
        explores = tuple(gene.name for gene in self.facts.genes)
        return RoundPlan(index, start_step, (phase,), explores=explores, evolves=end != self.facts.total_steps)

    def init(self, start: Fitness) -> Population:
        """Member 0 as the user configured it, the others as ``start`` says."""
        first = Genome.initial(self.facts.genes)
        probability = {"explored": self.options.resample_probability, "resampled": 1.0}.get(self.options.start)
        if probability is None:
            return Population((first,) * self.facts.population_size)
        others = (self._explored(first, -1, member, probability) for member in range(1, self.facts.population_size))
        return Population((first, *others))

    def evolve(self, population: Population, plan: RoundPlan, fitness: Fitness) -> Decision:
        """Exploit, then explore, only in the copies.

        Raises:
            EvaluationError: if no member's losses are finite; the message names the round.
        """
        o = self.options
        if o.exploit == "truncation":
            donors = truncation(fitness, o.quantile, self.facts.seed, plan.index)
        else:
            donors = ttest(fitness, o.p_value, self.facts.seed, plan.index)
        genomes = tuple(
            genome
            if donor == member
            else self._explored(population.genomes[donor], plan.index, member, o.resample_probability)
            for member, (genome, donor) in enumerate(zip(population.genomes, donors, strict=True))
        )
        reasons = tuple("goes on" if d == m else f"exploits {d}, explores" for m, d in enumerate(donors))
        return Decision(Population(genomes, population.memory), donors, reasons=reasons)

    def _explored(self, genome: Genome, round_: int, member: int, resample_probability: float) -> Genome:
        values = dict(genome.values)
        for gene in self.facts.genes:
            draws = mutation.uniforms(self.facts.seed, round_, member, f"explore:{gene.name}", count=2)
            values[gene.name] = explored(gene, values[gene.name], resample_probability, self.options.factors, draws)
        return Genome(values, genome.step_sizes)


def truncation(fitness: Fitness, quantile: float, seed: int, round_: int) -> tuple[int, ...]:
    """Donors by Ray Tune's quantiles: each of the weakest ``ceil(quantile P)`` copies a random one of as many fittest.

    P counts the members whose loss is finite, and the quantiles never overlap. The members whose loss is not finite
    copy, too.
    """
    order = survivors(fitness, round_)
    count = math.ceil(len(order) * quantile)
    if count > len(order) / 2:
        count = len(order) // 2
    strong = order[: max(count, 1)]
    weak = set(order[len(order) - count :]) | set(np.flatnonzero(~fitness.is_finite).tolist())
    donors = list(range(fitness.num_members))
    for member in weak:
        donors[member] = strong[int(mutation.uniform(seed, round_, member, "exploit") * len(strong))]
    return tuple(donors)


def ttest(fitness: Fitness, p_value: float, seed: int, round_: int) -> tuple[int, ...]:
    """Donors by the paper's test: a member copies a random other that is better, by Welch's t-test over the batches.

    All copies are made at once, of measured states. If the copied member copies another, which was better still, both
    take that one's state. A member whose loss is not finite copies the member that it drew, or the fittest if that
    one's loss is not finite either.
    """
    best, finite = survivors(fitness, round_)[0], fitness.is_finite
    taken = list(range(fitness.num_members))
    for member in range(fitness.num_members if fitness.num_members > 1 else 0):
        other = int(mutation.uniform(seed, round_, member, "exploit") * (fitness.num_members - 1))
        other += other >= member
        if not finite[member]:
            taken[member] = other if finite[other] else best
        elif finite[other] and is_better(fitness, other, member, p_value):
            taken[member] = other
    return tuple(root(member, taken) for member in range(fitness.num_members))


def is_better(fitness: Fitness, first: int, second: int, p_value: float) -> bool:
    """Whether ``first`` has the lower mean loss, with a two-sided p-value of Welch's t-test below ``p_value``.

    Losses without variance differ with certainty or not at all. A single batch gives no evidence.
    """
    a, b = fitness.losses[first], fitness.losses[second]
    if not a.mean() < b.mean() or len(a) < 2:
        return False
    spread = (a.std(ddof=1), b.std(ddof=1))
    if spread == (0.0, 0.0):
        return True
    test = stats.ttest_ind_from_stats(a.mean(), spread[0], len(a), b.mean(), spread[1], len(b), equal_var=False)
    return bool(test.pvalue < p_value)


def explored(
    gene: Gene, value: float, resample_probability: float, factors: Sequence[float], draws: Sequence[float] | np.ndarray
) -> float:
    """The gene's next value: drawn anew over its bounds, evenly in its scale, or multiplied by a random factor.

    Args:
        gene: whose value it is.
        value: the donor's.
        resample_probability: probability of a new draw.
        factors: from which the random factor is drawn.
        draws: two numbers between 0 and 1: the first chooses between the two, the second gives the value.
    """
    if draws[0] < resample_probability:
        low, high = (gene.encode(bound) for bound in gene.bounds)
        return gene.expressed(gene.decode(low + float(draws[1]) * (high - low)))
    return perturbed(gene, value, factors[int(draws[1] * len(factors))])


def perturbed(gene: Gene, value: float, factor: float) -> float:
    """``value`` times ``factor``, reflected at the bounds; a whole number moves by at least one."""
    if not gene.integer:
        return gene.decode(gene.reflect(gene.times(value, factor)))
    whole = gene.expressed(value)
    moved = gene.expressed(gene.decode(gene.reflect(gene.times(whole, factor))))
    if moved != whole:
        return moved
    step = 1.0 if factor > 1 else -1.0
    inside = [near for near in (whole + step, whole - step) if gene.bounds[0] <= near <= gene.bounds[1]]
    return inside[0] if inside else whole
