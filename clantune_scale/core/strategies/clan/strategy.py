"""The default: one centre for the clan, members perturbed around it, a parabola through their losses.

The original clan-training proposal (``classic.py``) truncates, clones and mutates. Measurements led to this form:

- Members that share gradients and differ only in learning rate make a round an exact line search along one common
  displacement. Their losses are paired, so tiny perturbations are enough.
- Averaged weights take away the reward for the lower noise of a smaller learning rate.
- Rounds grow with the age of the run, and genes freeze before the final decay.
- A shared line cannot show how much higher a learning rate could go after its own noise is averaged. One short
  learning-rate trial shows that (``lr_trial.py``).
- A shared line finds the rate good that the clan has. So the configured one is a prior, to which rates come back
  (``prior.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.rounds import PhaseKind, RoundPlan
from clantune_scale.core.strategies.base import Decision, Population, RunFacts, Strategy
from clantune_scale.core.strategies.clan.centre import moved
from clantune_scale.core.strategies.clan.group_slopes import slope_moves
from clantune_scale.core.strategies.clan.guard import Guard, Verdict
from clantune_scale.core.strategies.clan.lr_trial import FEWEST, is_trial_gene, outcome
from clantune_scale.core.strategies.clan.overfitting import (
    MAX_RATE_FACTOR,
    OVERFITS,
    OverfittingDetector,
    regularized,
    scale_of,
)
from clantune_scale.core.strategies.clan.parabola import Move, fit_moves
from clantune_scale.core.strategies.clan.perturbations import perturbations
from clantune_scale.core.strategies.clan.plan import ClanOptions, ClanPlanner
from clantune_scale.core.strategies.clan.prior import Prior
from clantune_scale.errors import EvaluationError

#: A rise of a learning rate, in log units, at which the line search needs no trial: it comes as fast by itself, and
#: more gently. The minimum along the line is at most log 2 away if curvature is next to nothing.
CLIMBING = 0.6
#: Why a gene stays in a round that lost ground while training made progress: every lower rate would look better.
HELD = "training makes progress"
#: What a move says after its reason if the configured rate has changed it.
BELIEVED = "the configured rate is believed"


class ClanStrategy(Strategy):
    """Line search by a clan.

    ``Population.memory`` holds:

    - ``centre``: by gene, in scale units;
    - ``guard``: see :class:`~clantune_scale.core.strategies.clan.guard.Guard`;
    - ``moves``: the last change of each explored gene, and why;
    - ``doubted``: by gene, the rises that were asked for and not made, see
      :class:`~clantune_scale.core.strategies.clan.prior.Prior`;
    - ``snapshot_loss``: the loss of the last rollback snapshot;
    - ``scale`` and ``overfits``: see :mod:`~clantune_scale.core.strategies.clan.overfitting`.
    """

    Options = ClanOptions
    uses_ema = has_one_state = True

    def __init__(self, facts: RunFacts, options: ClanOptions | None = None) -> None:
        super().__init__(facts)
        self.options = options or ClanOptions()
        self._planner = ClanPlanner(facts, self.options)
        # A clan that sees no minimum moves by less than any doubt, and has to.
        width = math.log(self.options.prior) if facts.population_size >= FEWEST else 0.0
        self._prior = Prior(width, self.options.prior_doubt, self.options.prior_pull)
        self.guards = self.uses_ema = self._planner.can_explore
        self.needs_slopes = self._planner.can_explore and self.options.group_slopes

    def plan(self, index: int, start_step: int) -> RoundPlan:
        return self._planner.plan(index, start_step)

    @property
    def decay_start_step(self) -> int | None:
        return self._planner.decay_start_step

    def init(self, start: Fitness) -> Population:
        """Members perturbed around the values that the user configured (learning rates a little lower).

        Raises:
            EvaluationError: if no member's loss at the start is finite.
        """
        loss = float(start.mean.min())
        if not np.isfinite(loss):
            raise EvaluationError(
                "the validation loss before the first step is not finite, so progress cannot be measured. "
                "Check the evaluation data and the model's initial weights."
            )
        centre = {gene.name: gene.encode(gene.initial) for gene in self.facts.genes}
        if self.facts.population_size >= FEWEST:  # a smaller clan sees no minimum and would hardly climb back
            for gene in filter(is_trial_gene, self.facts.genes):
                centre[gene.name] = gene.encode(max(gene.initial * self.options.start_factor, gene.bounds[0]))
        memory = {
            "centre": centre,
            "guard": Guard.of(start).to_memory(),
            "moves": {},
            "doubted": {},
            "snapshot_loss": loss,
            "scale": None,
            "overfits": False,
        }
        return self._population(memory, self.plan(0, 0))

    def evolve(self, population: Population, plan: RoundPlan, fitness: Fitness) -> Decision:
        """Moves the centre by the parabolas and gives everyone the fittest member's state, or rolls back.

        Raises:
            EvaluationError: if no loss is finite and no learning rate is left to lower.
        """
        next_plan = self.plan(plan.index + 1, plan.end_step)
        if not plan.explores:
            return self._last_word(population, next_plan, fitness)
        memory, best = population.memory, float(fitness.mean.min())
        verdict = self._judged(memory, plan, fitness)
        memory = {**memory, "guard": verdict.guard.to_memory()}
        if verdict.is_undone:
            return self._roll_back(memory, plan, next_plan, best)
        moves, doubted = self._believed(self._moves(population, plan, fitness), memory)
        if not verdict.is_rates_fault:
            moves = {name: Move(max(move.change, 0.0), HELD) for name, move in moves.items()}
        if memory["overfits"]:
            moves = regularized(moves, self.facts.genes)
        memory = {
            **memory,
            **self._seen_of_overfitting(memory, plan, fitness),
            "centre": moved(memory["centre"], {name: move.change for name, move in moves.items()}, self.facts.genes),
            "doubted": doubted,
            "snapshot_loss": memory["snapshot_loss"] if verdict.has_lost_ground else best,
            "moves": {name: {"change": move.change, "why": move.why} for name, move in moves.items()},
        }
        memory = self._reined_in(memory)
        donor = fitness.ranking[0]
        said = [f"{name} {move.change:+.3f} ({move.why})" for name, move in moves.items()]
        said += [OVERFITS] if memory["overfits"] else []
        reasons = [f"takes member {donor}'s state"] * fitness.num_members
        reasons[donor] = "; ".join(["fittest", *said])
        donors = (donor,) * fitness.num_members
        return Decision(
            self._population(memory, next_plan),
            donors,
            takes_snapshot=not verdict.has_lost_ground,
            reasons=tuple(reasons),
        )

    def idle(self, population: Population) -> Decision:
        """As for all strategies, but a clan that overfits takes no rollback snapshot after the freeze."""
        return replace(super().idle(population), takes_snapshot=not population.memory["overfits"])

    def _last_word(self, population: Population, next_plan: RoundPlan, fitness: Fitness) -> Decision:
        """At the end: a rollback if no loss is finite, or if the clan overfits and its snapshot was better."""
        memory, best = population.memory, float(fitness.mean.min())
        idle = self.idle(self._population(memory, next_plan))
        kept = memory["snapshot_loss"]
        if np.isfinite(best) and not (memory["overfits"] and kept < best):
            return idle
        reason = "rolled back: no member's loss is finite at the end of the run"
        if memory["overfits"]:
            reason = f"rolled back: the loss of the last snapshot, {kept:.4g}, is better than {best:.4g}"
        return replace(idle, rolls_back=True, reasons=(reason,) * fitness.num_members)

    def _seen_of_overfitting(self, memory: Mapping[str, Any], plan: RoundPlan, fitness: Fitness) -> dict[str, Any]:
        """What the round adds to memory. Nothing if members trained apart, or if no sample is seen twice."""
        if self.facts.sees_samples_once or _trains_apart(plan):
            return {}
        if memory["scale"] is None:
            return {"scale": scale_of(fitness)}
        initial_loss = Guard.from_memory(memory["guard"]).initial_loss
        return {"overfits": OverfittingDetector(initial_loss, memory["scale"]).overfits(fitness)}

    def _reined_in(self, memory: dict[str, Any]) -> dict[str, Any]:
        """Memory with the learning rates of a clan that overfits: none is far above the configured ones."""
        centre = dict(memory["centre"])
        for gene in self._learning_rates if memory["overfits"] else ():
            centre[gene.name] = min(centre[gene.name], gene.encode(min(MAX_RATE_FACTOR * gene.initial, gene.bounds[1])))
        return {**memory, "centre": centre}

    def resized(self, population: Population, sources: Sequence[int], plan: RoundPlan) -> Population:
        """All members around the centre, which belongs to the clan and to no member."""
        return self._population(population.memory, plan)

    def _moves(self, population: Population, plan: RoundPlan, fitness: Fitness) -> dict[str, Move]:
        if self._is_trial_round(plan, population.memory):
            return self._trial_moves(plan, fitness)
        genes = [self.facts.gene(name) for name in plan.explores]
        centre = population.memory["centre"]
        if plan.slopes:
            return slope_moves(genes, population.genomes, centre, fitness, caution=self.options.caution)
        offsets = [
            [gene.encode(gene.expressed(genome.values[gene.name])) - centre[gene.name] for gene in genes]
            for genome in population.genomes
        ]
        moves = fit_moves(
            np.array(offsets),
            fitness.losses,
            [gene.max_change for gene in genes],
            is_rate=[gene.target == "lr" and gene.scale == "log" for gene in genes],
            caution=self.options.caution,
        )
        return {gene.name: move for gene, move in zip(genes, moves, strict=True)}

    def _believed(
        self, moves: Mapping[str, Move], memory: Mapping[str, Any]
    ) -> tuple[dict[str, Move], dict[str, float]]:
        """The moves with what the configured learning rates have to say, and the rises that they doubt."""
        believed, doubted = dict(moves), dict(memory["doubted"])
        for gene in filter(is_trial_gene, map(self.facts.gene, moves)):
            asked, name = moves[gene.name], gene.name
            distance = memory["centre"][name] - gene.encode(gene.initial)
            change, doubted[name] = self._prior.shrunk(asked.change, distance, doubted.get(name, 0.0))
            if change != asked.change:
                believed[name] = Move(change, f"{asked.why}, {BELIEVED}")
        return believed, doubted

    def _is_trial_round(self, plan: RoundPlan, memory: Mapping[str, Any]) -> bool:
        """Whether this round is the trial. It is left out if learning rates climb well without it, or must not rise."""
        if not self._planner.is_trial_at(plan.start_step) or memory["overfits"]:
            return False
        return all(memory["moves"].get(name, {"change": 0.0})["change"] < CLIMBING for name in plan.explores)

    def _trial_moves(self, plan: RoundPlan, fitness: Fitness) -> dict[str, Move]:
        """All learning rates rise together, by what the trial says of its groups."""
        trial = self._planner.trial
        assert trial is not None
        leaders = [trial.teams.index(team) for team in range(len(trial.offsets))]
        move = outcome(trial.offsets, fitness.mean[leaders].tolist(), share=self.options.trial_share)
        return dict.fromkeys(plan.explores, move)

    def _judged(self, memory: Mapping[str, Any], plan: RoundPlan, fitness: Fitness) -> Verdict:
        """What the guard says of a round. If its members trained apart, the clan has no training loss."""
        return Guard.from_memory(memory["guard"]).judge(
            fitness,
            # Weights that competed have another noise floor, so each kind of round has its own best.
            kind=self.facts.gene(plan.explores[0]).kind,
            share=self.options.guard,
            training=None if _trains_apart(plan) else fitness.training_loss,
            holds=memory["overfits"],
        )

    def _roll_back(self, memory: Mapping[str, Any], plan: RoundPlan, next_plan: RoundPlan, best: float) -> Decision:
        """Rolls back to the snapshot and lowers every learning rate. No other gene moves."""
        centre, moves = dict(memory["centre"]), {}
        for gene in self._learning_rates:
            before = gene.decode(centre[gene.name])
            after = max(before / self.options.guard_divisor, gene.bounds[0])
            if after < before:
                centre[gene.name] = gene.encode(after)
                moves[gene.name] = {"change": gene.encode(after) - gene.encode(before), "why": "guard"}
        if not np.isfinite(best) and not moves:
            raise EvaluationError(
                f"round {plan.index}: no member's validation loss is finite, and there is no learning-rate gene above "
                f"its lower bound to divide by {self.options.guard_divisor:g}. Start from a configuration that trains."
            )
        population = self._population({**memory, "centre": centre, "moves": moves, "doubted": {}}, next_plan)
        members = range(self.facts.population_size)
        rates = f"learning rates divided by {self.options.guard_divisor:g}" if moves else "no learning rate to lower"
        reason = f"rolled back: best loss {best:.4g} lost too much ground; {rates}"
        return Decision(population, tuple(members), rolls_back=True, reasons=tuple(reason for _ in members))

    @property
    def _learning_rates(self) -> list[Gene]:
        return [gene for gene in self.facts.genes if gene.target == "lr"]

    def _population(self, memory: Mapping[str, Any], plan: RoundPlan) -> Population:
        """Everyone at the centre, perturbed in the genes that ``plan`` explores, or set apart for the trial."""
        genes, centre = self.facts.genes, memory["centre"]
        at_centre = {gene.name: gene.decode(centre[gene.name]) for gene in genes}
        steps = {gene.name: gene.step_size for gene in genes}
        values = [dict(at_centre) for _ in range(self.facts.population_size)]
        trial = self._planner.trial
        if trial is not None and self._is_trial_round(plan, memory):
            for member, own in enumerate(values):
                apart = moved(centre, dict.fromkeys(plan.explores, trial.offset(member)), genes)
                own.update({gene.name: gene.decode(apart[gene.name]) for gene in genes})
        elif plan.explores:
            # Learning rates whose slopes are measured vary together, so that one column is theirs.
            columns = plan.explores[:1] if plan.slopes else plan.explores
            z = perturbations(len(values), columns, seed=self.facts.seed, round_=plan.index)
            for column, name in enumerate(plan.explores):
                gene = self.facts.gene(name)
                for member, own in enumerate(values):
                    x = centre[name] + _perturbation_size(gene, at_centre[name]) * z[member, column % len(columns)]
                    own[name] = gene.decode(gene.reflect(x))
        return Population(tuple(Genome(own, steps) for own in values), memory)


def _trains_apart(plan: RoundPlan) -> bool:
    return any(phase.kind is PhaseKind.COMPETITIVE for phase in plan.phases)


def _perturbation_size(gene: Gene, value: float) -> float:
    """The perturbation of a gene: its step size, or one whole number if that is more."""
    if not gene.integer:
        return gene.step_size
    low, high = gene.bounds
    neighbour = value + 1 if value + 1 <= high else max(value - 1, low)
    return max(gene.step_size, abs(gene.encode(neighbour) - gene.encode(value)))
