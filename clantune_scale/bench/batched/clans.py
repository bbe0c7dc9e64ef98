"""The clan's loop over many clans at once; :mod:`clantune_scale.reference.clan` says the same slowly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch

from clantune_scale.bench.batched.expression import Expressed, Values
from clantune_scale.bench.batched.feed import Feed, Reading
from clantune_scale.bench.batched.line import ONE_GROUP, LineRound, line_of
from clantune_scale.bench.batched.model import BatchedModel, Settings, Tensors
from clantune_scale.bench.batched.optimizers import OPTIMIZERS
from clantune_scale.bench.batched.sharing import Sharing, clip
from clantune_scale.bench.batched.state import RowLayout, State
from clantune_scale.core.fitness import Fitness, Slopes
from clantune_scale.core.genome import Genome
from clantune_scale.core.line import Line, averaging_weight, averaging_weights, slope_members
from clantune_scale.core.lineage import Lineage, RoundRecord
from clantune_scale.core.rounds import Phase, PhaseKind, Position, RoundClock, RoundPlan
from clantune_scale.core.strategies.base import Decision, Population, Strategy
from clantune_scale.core.strategies.lost_members import replace_lost
from clantune_scale.errors import ConfigError, EvaluationError

_Value = TypeVar("_Value", int, str)


@dataclass
class BatchedClan:
    """One clan of a batch: who decides, and what was decided.

    Attributes:
        strategy: its own, with the run's facts.
        settings: what its user configured.
        seed: of its initial weights and its data.
        population: the genomes in effect and the strategy's memory.
        clock: its rounds.
        lineage: the rounds so far.
        decisions: one per round, None if nothing evolved.
        num_trained: samples whose gradient was computed, over all members.
        num_evaluated: examples whose loss was computed for decisions, over all members.
        failure: why its strategy gave up; the other clans go on, and this one is no longer asked.
    """

    strategy: Strategy
    settings: Settings
    seed: int
    population: Population
    clock: RoundClock
    lineage: Lineage = field(default_factory=Lineage)
    decisions: list[Decision | None] = field(default_factory=list)
    num_trained: int = 0
    num_evaluated: int = 0
    failure: EvaluationError | None = None

    def evolve(self, plan: RoundPlan, fitness: Fitness) -> Decision:
        """What follows from a round, recorded."""
        decision = self.strategy.idle(self.population)
        is_new = plan.evolves and self.failure is None
        if is_new:
            try:
                decision = replace_lost(self.strategy.evolve(self.population, plan, fitness), fitness)
            except EvaluationError as error:
                self.failure, is_new = error, False
        self.lineage.append(RoundRecord.of(plan, self.population.genomes, fitness, decision))
        self.decisions.append(decision if is_new else None)
        return decision


class BatchedClans:
    """Independent clans of one size on one model, in step.

    All clans share the lengths of their rounds, because plans are pure functions of the step; give them
    strategies of one kind and equal options. Seeds, settings, genomes, decisions and teams are each clan's own.

    Args:
        model: loss and data.
        strategies: [clans].
        settings: [clans], with one optimizer.
        seeds: [clans], of initial weights and data.
        num_eval_batches: batches that the common window is cut into.
        dtype: of weights and optimizer state.
        members: ``"line"`` computes members from the clan's centre in rounds that allow it (``core.line``); in all
            other rounds, and with ``"groups"``, members are real.
        average_every: steps from one update of averaged weights to the next.

    Attributes:
        clans: [clans], their decisions so far.
        num_steps: optimizer steps done.
        state: of all members.

    Raises:
        ConfigError: if clans differ in size or optimizer, or a batch cannot be shared out evenly.
    """

    def __init__(
        self,
        model: BatchedModel,
        *,
        strategies: Sequence[Strategy],
        settings: Sequence[Settings],
        seeds: Sequence[int],
        num_eval_batches: int = 16,
        dtype: torch.dtype = torch.float32,
        members: Literal["groups", "line"] = "groups",
        average_every: int = 1,
    ) -> None:
        self._average_every = average_every
        self._on_line = members == "line"
        self._line_round: LineRound | None = None
        self.num_members = _shared({strategy.facts.population_size for strategy in strategies}, "population sizes")
        self._rule = OPTIMIZERS[_shared({own.optimizer for own in settings}, "optimizers")]
        if model.batch_size % self.num_members:
            raise ConfigError(
                f"a batch of {model.batch_size} samples cannot be shared out evenly by {self.num_members} members. "
                f"Choose a population size that divides it."
            )
        self._model, self._num_eval_batches = model, num_eval_batches
        self._micro_batch = model.batch_size // self.num_members
        initial = {seed: model.init(seed) for seed in set(seeds)}
        self._layout = RowLayout([parameter.shape for parameter in initial[seeds[0]]])
        rows = torch.stack([self._layout.flatten(initial[seed]) for seed in seeds]).to(dtype)
        self.state = State.initial(rows, self.num_members, self._rule.slot_sizes(self._layout))
        self._leaves = [view.detach().requires_grad_() for view in self._layout.views(self.state.weights)]
        # By parameter: a stretch of the row, in the group of that name.
        self._groups = tuple(model.group_of)
        self._sizes = self._layout.sizes if self._groups else []
        self._feed = Feed(model, seeds, self.num_members)
        self.num_steps = 0
        starts = self._losses(averaged=False)
        self.clans = [
            BatchedClan(strategy, own, seed, strategy.init(start), RoundClock(strategy.plan))
            for strategy, own, seed, start in zip(strategies, settings, seeds, starts, strict=True)
        ]
        for clan in self.clans:
            clan.clock.regroup(0, clan.population.teams)
        self._before_phase: State | None = None
        self._training_losses: list[torch.Tensor] = []
        self._snapshot = self.state.save() if any(strategy.guards for strategy in strategies) else None

    def run(self, num_steps: int) -> None:
        """Trains on for ``num_steps`` optimizer steps."""
        for _ in range(num_steps):
            self.step()

    def step(self) -> None:
        """One optimizer step of every member of every clan, and the round's end if the step is its last."""
        position = self.clans[0].clock.at(self.num_steps)
        if position.starts_phase:
            self._begin_phase(position)
        hyper = self._expressed.at(self.num_steps)
        gradient = clip(self._gradient(), hyper["clip"])
        if self._line_round is not None:
            self._line_round.before_update(
                self.state, self.num_steps - position.plan.start_step, hyper["lr"], hyper["weight_decay"]
            )
        self._rule.update(self.state, gradient, hyper, self._layout)
        self.num_steps += 1
        for clan, num_samples in zip(self.clans, self._reading.num_samples, strict=True):
            clan.num_trained += num_samples
        if position.plan.uses_ema:
            plan, offset = position.plan, self.num_steps - 1 - position.plan.start_step
            weight = averaging_weight(self.num_steps, plan.ema_window_steps)
            if self._average_every > 1:
                weight = averaging_weights(plan, every=self._average_every)[offset]
            if weight:
                self.state.update_average(weight)
        if position.ends_round:
            self._end_round(position.plan)

    def evaluate(self, *, averaged: bool = False) -> list[Fitness]:
        """[clans]: losses on the common window, of averaged weights or of those that train."""
        return self._losses(averaged=averaged)

    def _read_training_losses(self) -> list[float]:
        """[clans]: mean over members and steps since the last call."""
        means, self._training_losses = torch.stack(self._training_losses).mean(dim=0), []
        return means.tolist()

    @torch.no_grad()
    def losses_on(self, examples: Tensors, *, averaged: bool = False, chunk: int = 256) -> torch.Tensor:
        """[clans, members, examples]: losses on tensors [examples, ...], without what is random in training."""
        rows = self.state.average if averaged else self.state.weights
        parameters, count = self._layout.views(rows), len(rows) * self.num_members
        parts = [
            self._model.losses(parameters, [column.expand(count, *column.shape) for column in columns], {})
            for columns in zip(*(tensor.split(chunk) for tensor in examples), strict=True)
        ]
        return torch.cat(parts, dim=1).unflatten(0, (-1, self.num_members))

    def _losses(self, *, averaged: bool) -> list[Fitness]:
        losses = self.losses_on(self._model.validation, averaged=averaged).double()
        batches = torch.stack([part.mean(dim=-1) for part in losses.tensor_split(self._num_eval_batches, dim=-1)], -1)
        return [Fitness.from_losses(own) for own in batches.numpy()]

    def _begin_phase(self, position: Position) -> None:
        plan, clock = position.plan, self.clans[0].clock
        if position.starts_round and plan.uses_ema and plan.index and not clock.round(plan.index - 1).uses_ema:
            self.state.update_average(1.0)  # an average that stood still for a round begins anew
        if not position.phase.keeps and self._before_phase is None:
            self._before_phase = self.state.save()
        phases = [clan.clock.at(self.num_steps).phase for clan in self.clans]
        if position.starts_round:
            self._genomes = self._begin_line(plan) if self._on_line else [own.population.genomes for own in self.clans]
        values = [
            Values.of(clan.strategy.facts.genes, own, clan.settings, phase.kind, self._groups)
            for clan, own, phase in zip(self.clans, self._genomes, phases, strict=True)
        ]
        self._expressed = Expressed(
            values,
            [clan.settings for clan in self.clans],
            [clan.strategy for clan in self.clans],
            dtype=self.state.weights.dtype,
            sizes=self._sizes,
        )
        counts = [own.micro_batches for own in values]
        self._reading = Reading.of(self._read(phases), counts, self._micro_batch, self.num_members)
        self._sharing = Sharing.of(phases, self.num_members)

    def _read(self, phases: Sequence[Phase]) -> Sequence[Phase]:
        """``phases``, in which every turn of members on the line reads the whole batch, as a loop's steps do."""
        if not self._on_line:
            return phases
        is_turn = [phase.kind is PhaseKind.COMPETITIVE and not phase.teams for phase in phases]
        return [
            replace(phase, batch_factor=self.num_members) if turn else phase
            for phase, turn in zip(phases, is_turn, strict=True)
        ]

    def _begin_line(self, plan: RoundPlan) -> list[Sequence[Genome]]:
        """[clans] the genomes that rows train with in this round: the centre's if a clan is on the line."""
        is_one = (self.state.weights == self.state.weights[:, :1]).flatten(1).all(dim=1).tolist()
        lines: list[Line | None] = [
            line_of(
                clan.population.genomes,
                clan.strategy.facts.genes,
                clan.clock.at(self.num_steps).plan,
                self._groups or ONE_GROUP,
            )
            if together
            else None  # a strategy has kept its members apart
            for clan, together in zip(self.clans, is_one, strict=True)
        ]
        if any(line is not None for line in lines):
            rules = [self._rule.decay_rule(clan.settings.base()) for clan in self.clans]
            self._line_round = LineRound(
                lines, rules, plan, self.state, average_every=self._average_every, sizes=self._sizes
            )
        return [
            clan.population.genomes if line is None else (Genome(line.centre),) * self.num_members
            for clan, line in zip(self.clans, lines, strict=True)
        ]

    def _gradient(self) -> torch.Tensor:
        """[clans, members or 1, size]: what each member applies, its own gradient or its team's mean."""
        losses = self._model.losses(self._leaves, self._feed.read(self.num_steps, self._reading), self._expressed.knobs)
        shares = self._reading.shares
        means = losses.mean(dim=1) if shares is None else (losses * shares.to(losses.dtype)).sum(dim=1)
        self._training_losses.append(means.detach().double().view(-1, self.num_members).mean(dim=1))
        total = means.sum()
        return self._sharing.shared(torch.autograd.grad(total, self._leaves))

    def _end_round(self, plan: RoundPlan) -> None:
        """Evaluate, undo phases that keep nothing, decide, record, roll back or transfer, average, regroup."""
        slopes: list[Slopes | None] = [None] * len(self.clans)
        if self._line_round is not None:
            self._line_round.part(self.state)
            if plan.slopes:
                slopes = self._slopes(plan, self._line_round)
            self._line_round = None
        losses = zip(self.evaluate(averaged=plan.uses_ema), self._read_training_losses(), strict=True)
        fitness = [
            replace(own, training_loss=mean, slopes=own_slopes)
            for (own, mean), own_slopes in zip(losses, slopes, strict=True)
        ]
        if self._before_phase is not None:
            self.state.load(self._before_phase, torch.ones(len(self.clans), dtype=torch.bool))
            self._before_phase = None
        self._apply(plan, [clan.evolve(plan, own) for clan, own in zip(self.clans, fitness, strict=True)])

    def _slopes(self, plan: RoundPlan, line: LineRound) -> list[Slopes | None]:
        """[clans]: the genes' slopes at the averages of the outermost members, one backward pass a batch."""
        ends = [slope_members(clan.population.genomes, plan.slopes[0]) for clan in self.clans]
        index = torch.tensor(ends).unsqueeze(-1).expand(-1, -1, self._layout.size)
        rows = self.state.average.gather(1, index)
        moved = self._layout.parts(line.travelled(self.state.average).gather(1, index))
        leaves = [view.detach().requires_grad_() for view in self._layout.views(rows)]
        by_batch = []
        for columns in zip(*(t.tensor_split(self._num_eval_batches) for t in self._model.validation), strict=True):
            inputs = [column.expand(len(leaves[0]), *column.shape) for column in columns]
            gradient = torch.autograd.grad(self._model.losses(leaves, inputs, {}).mean(dim=1).sum(), leaves)
            by_batch.append(
                torch.stack([(g.view_as(m) * m).flatten(2).sum(dim=2) for g, m in zip(gradient, moved, strict=True)])
            )
        table = torch.stack(by_batch, dim=-1).double().numpy()  # [parameters, clans, ends, batches]
        result: list[Slopes | None] = []
        for number, (clan, own) in enumerate(zip(self.clans, ends, strict=True)):
            genes = [clan.strategy.facts.gene(name) for name in plan.slopes]
            of = {g.name: [i for i, name in enumerate(self._groups) if name in (g.groups or ())] for g in genes}
            result.append(Slopes(own, {name: table[places, number].sum(axis=0) for name, places in of.items()}))
            # A backward pass is two forward ones, which were counted.
            clan.num_evaluated += 4 * len(self._model.validation[0])
        return result

    def _apply(self, plan: RoundPlan, decisions: Sequence[Decision]) -> None:
        """Carries out what the clans decided."""
        restores = torch.tensor([decision.rolls_back for decision in decisions])
        if self._snapshot is not None and bool(restores.any()):
            self.state.load(self._snapshot, restores)
        self.state.transfer(torch.tensor([decision.donors for decision in decisions]))
        mixes = torch.tensor([decision.mixing_weights is not None for decision in decisions])
        if bool(mixes.any()):
            only_own = (1.0, *[0.0] * (self.num_members - 1))
            weights = torch.tensor([decision.mixing_weights or only_own for decision in decisions], dtype=torch.float64)
            self.state.mix(weights.to(self.state.weights.dtype), mixes)
        keeps = torch.tensor([decision.takes_snapshot for decision in decisions]) & ~restores
        if self._snapshot is not None and bool(keeps.any()):
            self._snapshot.load(self.state, keeps)
        for clan, decision in zip(self.clans, decisions, strict=True):
            clan.population = decision.population
            # A round that does not evolve is measured only for the record.
            clan.num_evaluated += plan.evolves * len(self._model.validation[0]) * self.num_members
            clan.clock.regroup(plan.index + 1, clan.population.teams)


def _shared(values: set[_Value], what: str) -> _Value:
    """The one value in ``values``."""
    if len(values) != 1:
        raise ConfigError(f"clans of one batch have {what} {sorted(values)}. Put those that differ into batches apart.")
    return values.pop()
