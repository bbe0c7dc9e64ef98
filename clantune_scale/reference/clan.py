"""The method in one process, slow and obvious: the twin that every distributed clan is compared with.

It keeps one copy of the module and one optimizer per member and does, one member after another, what
the ranks of a clan do at once. Nothing here is sharded, hooked, bucketed or sent; read it to learn what a
clan is, and use it to train one on a single device.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch

from clantune_scale.core import decay
from clantune_scale.core.consensus import values_in_effect
from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import GROUP_KEYS, Gene
from clantune_scale.core.lineage import Lineage, RoundRecord
from clantune_scale.core.rounds import Phase, PhaseKind, Position, RoundClock, RoundPlan
from clantune_scale.core.strategies.base import Decision, Population, Strategy
from clantune_scale.core.strategies.lost_members import replace_lost
from clantune_scale.data.sampler import StepPlan
from clantune_scale.reference.line import Calls, OnTheLine
from clantune_scale.reference.member import Member, Saved


class ReferenceClan:
    """A clan on plain tensors.

    Args:
        module: the initial weights; copied for each member.
        strategy: with the run's facts, its genes among them.
        optimizer: parameters to an optimizer; called for each member.
        loss_fn: (module, batch) to a scalar loss, the mean over the batch.
        batch: (step, member, micro-batch, plan) to a micro-batch. One that a member's dp ranks would
            have read between them makes the member's gradient the same as theirs.
        eval_batches: the common validation window.
        scheduler: optimizer to a learning-rate scheduler that is stepped after every step.
        num_micro_batches: of a member in a step, before any gene or ``batch_factor``.
        clip: largest global norm of the gradient that is applied; 0 for no clipping.
        setters: by target, (module, value) for genes that the user registers.
        members: ``"groups"`` trains them all; ``"line"`` computes them from one (``line.py``), the only one in
            ``members`` then.

    Attributes:
        num_steps: optimizer steps done.
        population: the genomes in effect and the strategy's memory.
        lineage: the rounds so far.
        decisions: one per round, None if nothing evolved.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        strategy: Strategy,
        optimizer: Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer],
        loss_fn: Callable[[torch.nn.Module, Any], torch.Tensor],
        batch: Callable[[int, int, int, StepPlan], Any],
        eval_batches: Sequence[Any],
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        num_micro_batches: int = 1,
        clip: float = 0.0,
        setters: Mapping[str, Callable[[torch.nn.Module, float], None]] | None = None,
        members: Literal["groups", "line"] = "groups",
    ) -> None:
        self.strategy, self.genes = strategy, strategy.facts.genes
        self._loss_fn, self._batch, self._eval_batches = loss_fn, batch, eval_batches
        self._num_micro_batches, self._clip, self._setters = num_micro_batches, clip, dict(setters or {})
        self.members = []
        size = strategy.facts.population_size
        for _ in range(size if members == "groups" else 1):
            own = copy.deepcopy(module)
            own_optimizer = optimizer(own.parameters())
            self.members.append(Member(own, own_optimizer, scheduler and scheduler(own_optimizer), clip))
        self._line = None
        if members == "line":
            self._line = OnTheLine(self.members[0], genes=self.genes, population_size=size, calls=self._calls())
        self.clock = RoundClock(strategy.plan)
        self.num_steps = 0
        self.lineage, self.decisions = Lineage(), list[Decision | None]()
        self.population: Population = strategy.init(self.evaluate())
        self.clock.regroup(0, self.population.teams)
        self._values: list[dict[str, float]] = []
        self._training_losses: list[list[float]] = [[] for _ in range(size)]
        self._before_phase: list[Saved] | None = None
        self._snapshot = self._save()

    def run(self, num_steps: int) -> None:
        """Trains on for ``num_steps`` optimizer steps."""
        for _ in range(num_steps):
            self.step()

    def step(self) -> None:
        """One optimizer step of every member, and the round's end if the step is its last."""
        position = self.clock.at(self.num_steps)
        if position.starts_phase:
            self._begin_phase(position)
        if self._line is None:
            self._step_all(position)
        else:
            self._line.step(position, self._values)
        self.num_steps += 1
        if position.ends_round:
            self._end_round(position.plan)

    def evaluate(self, *, averaged: bool = False) -> Fitness:
        """The clan's losses on the common window, of averaged weights or of those that train."""
        if self._line is not None:
            return Fitness.from_losses(self._line.losses(averaged))
        return Fitness.from_losses([self._losses(member, averaged) for member in self.members])

    def _step_all(self, position: Position) -> None:
        """Every member's own gradient, what is shared of them, and every member's own update."""
        for index, member in enumerate(self.members):
            member.optimizer.zero_grad()
            self._backward(index, member, position.phase, self.num_steps)
        for team in self._teams(position.phase):
            self._share_gradients(team)
        for member, values in zip(self.members, self._values, strict=True):
            self._update(member, values, self.num_steps)
            if position.plan.uses_ema:
                member.update_average(self.num_steps + 1, position.plan.ema_window_steps)

    def _begin_phase(self, position: Position) -> None:
        phase, plan = position.phase, position.plan
        if position.starts_round and plan.uses_ema and plan.index and not self.clock.round(plan.index - 1).uses_ema:
            for member in self.members:  # an average that stood still for a round begins anew
                member.average = [p.detach().clone() for p in member.parameters]
        if not phase.keeps and self._before_phase is None:
            self._before_phase = self._save()
        self._values = values_in_effect(self.population.genomes, self.genes, phase.kind)
        if self._line is not None:
            if position.starts_round:
                self._line.begin_round(plan, self.population.genomes)
            return
        for member, values in zip(self.members, self._values, strict=True):
            self._express_between_steps(member, values)

    def _backward(self, index: int, member: Member, phase: Phase, step: int, share: float = 1.0) -> None:
        """Adds ``share`` of the gradient at a member's place: the mean over its micro-batches."""
        plan = StepPlan.of(phase, [self._micro_batches(values) for values in self._values], index)
        for micro in range(plan.num_micro_batches):
            loss = self._loss_fn(member.module, self._batch(step, index, micro, plan))
            self._training_losses[index].append(float(loss.detach()))
            (loss * (share / plan.num_micro_batches)).backward()

    def _teams(self, phase: Phase) -> list[list[Member]]:
        """The members that share gradients with each other: all of them, a team's, or none."""
        if phase.kind is PhaseKind.COOPERATIVE:
            return [self.members]
        if phase.teams is None:
            return []
        names = sorted(set(phase.teams))
        return [[m for m, team in zip(self.members, phase.teams, strict=True) if team == name] for name in names]

    @torch.no_grad()
    def _share_gradients(self, team: Sequence[Member]) -> None:
        """Every member of the team gets the mean of its members' gradients."""
        for same in zip(*(member.parameters for member in team), strict=True):
            if same[0].grad is not None:
                mean = torch.stack([p.grad for p in same]).mean(dim=0)
                for parameter in same:
                    parameter.grad.copy_(mean)

    def _update(self, member: Member, values: Mapping[str, float], step: int) -> None:
        """Clips, applies the member's own optimizer genes only for the update, steps the user's schedule."""
        if member.clip > 0:
            torch.nn.utils.clip_grad_norm_(member.parameters, member.clip)
        with self._optimizer_genes(member, values, step):
            member.optimizer.step()
        if member.scheduler is not None:
            member.scheduler.step()

    def _end_round(self, plan: RoundPlan) -> None:
        """Evaluate, undo phases that keep nothing, decide, record, roll back or transfer, average, regroup."""
        fitness = replace(self.evaluate(averaged=plan.uses_ema), training_loss=self._read_training_loss())
        if plan.slopes:
            assert self._line is not None, "slopes are measured on the line"
            fitness = replace(fitness, slopes=self._line.slopes(plan, self.population.genomes))
        if self._before_phase is not None:
            self._load(self._before_phase)
            self._before_phase = None
        decision = self.strategy.idle(self.population)
        if plan.evolves:
            decision = replace_lost(self.strategy.evolve(self.population, plan, fitness), fitness)
        self.lineage.append(RoundRecord.of(plan, self.population.genomes, fitness, decision))
        self.decisions.append(decision if plan.evolves else None)
        if decision.rolls_back:
            self._load(self._snapshot)
        if self._line is None:
            self._transfer(decision)
        else:
            self._line.go_on(decision, rolled_back=not plan.phases[-1].keeps)
        if decision.takes_snapshot and not decision.rolls_back:
            self._snapshot = self._save()
        self.population = decision.population
        self.clock.regroup(plan.index + 1, self.population.teams)

    def _transfer(self, decision: Decision) -> None:
        for member, donor in enumerate(decision.donors):
            if donor != member:
                self.members[member].load(self.members[donor].save())
        if decision.mixing_weights is not None:
            self._average(decision.mixing_weights)

    @torch.no_grad()
    def _average(self, weights: Sequence[float]) -> None:
        """All take the weighted mean of weights, and that of averaged weights; optimizer states stay their own."""
        for role in ("parameters", "average"):
            for same in zip(*(getattr(member, role) for member in self.members), strict=True):
                # A member without weight may hold values that are not finite: a product with 0 would keep them.
                mean = sum(weight * tensor for weight, tensor in zip(weights, same, strict=True) if weight)
                for tensor in same:
                    tensor.copy_(mean)

    def _read_training_loss(self) -> float:
        """Mean over members of each one's mean since the last call; equals on the line train as one of them."""
        means = [sum(losses) / len(losses) for losses in self._training_losses if losses]
        self._training_losses = [[] for _ in self._training_losses]
        return sum(means) / len(means)

    def _calls(self) -> Calls:
        """What one model on the line asks of the clan."""
        model = self.members[0]

        def rates(values: Mapping[str, float], step: int) -> tuple[list[float], list[float]]:
            with self._optimizer_genes(model, values, step):
                groups = model.optimizer.param_groups
                return [float(g["lr"]) for g in groups], [float(g.get("weight_decay", 0.0)) for g in groups]

        return Calls(
            backward=lambda member, step, phase, share: self._backward(member, model, phase, step, share),
            update=lambda values, step: self._update(model, values, step),
            express=lambda values: self._express_between_steps(model, values),
            rates=rates,
            losses=lambda averaged: self._losses(model, averaged),
            gradients=lambda: self._gradients(model),
        )

    def _save(self) -> list[Saved]:
        return [member.save() for member in self.members]

    def _load(self, saved: Sequence[Saved]) -> None:
        for member, state in zip(self.members, saved, strict=True):
            member.load(state)

    @torch.no_grad()
    def _losses(self, member: Member, averaged: bool) -> list[float]:
        """One loss per batch of the common window, in evaluation mode; the member is left as it was."""
        was_training = member.module.training
        member.module.eval()
        if averaged:
            member.swap_average()
        losses = [float(self._loss_fn(member.module, batch)) for batch in self._eval_batches]
        if averaged:
            member.swap_average()
        member.module.train(was_training)
        return losses

    def _gradients(self, member: Member) -> Iterator[list[torch.Tensor | None]]:
        """By batch of the common window, the gradient of its loss in evaluation mode."""
        was_training = member.module.training
        member.module.eval()
        for batch in self._eval_batches:
            loss = self._loss_fn(member.module, batch)
            yield list(torch.autograd.grad(loss, member.parameters, allow_unused=True))
        member.module.train(was_training)

    @contextmanager
    def _optimizer_genes(self, member: Member, values: Mapping[str, float], step: int) -> Iterator[None]:
        """Inside, the optimizer's groups hold the genes; outside, what the user's schedule says."""
        groups = member.optimizer.param_groups
        scheduled = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        if self.strategy.lr_factor(step) == 1.0:
            member.scheduled = [float(group["lr"]) for group in groups]
        for index, group in enumerate(groups):
            own = float(group["lr"])
            chosen = [g for g in self.genes if g.groups is None or str(group.get("name", index)) in g.groups]
            for gene in chosen:
                if gene.target in GROUP_KEYS:
                    _write(group, gene, values[gene.name])
            factor = self.strategy.lr_factor(step)
            if not any(gene.target == "lr" and not gene.relative for gene in chosen):
                factor = decay.under_ceiling(factor, reference=member.scheduled[index], scheduled=own)
            group["lr"] = group["lr"] * factor  # not in place: it may be a tensor
        try:
            yield
        finally:
            for group, before in zip(groups, scheduled, strict=True):
                group.update(before)

    def _express_between_steps(self, member: Member, values: Mapping[str, float]) -> None:
        """Genes that no schedule touches: clip threshold, dropout rates, the user's."""
        for gene in self.genes:
            value = gene.expressed(values[gene.name])
            if gene.target in self._setters:
                self._setters[gene.target](member.module, value)
            elif gene.target == "clip":
                member.clip = value * self._clip if gene.relative else value
            elif gene.target == "dropout":
                for part in member.module.modules():
                    if isinstance(part, torch.nn.modules.dropout._DropoutNd):
                        part.p = value

    def _micro_batches(self, values: Mapping[str, float]) -> int:
        for gene in self.genes:
            if gene.target == "accumulation":
                base = self._num_micro_batches if gene.relative else 1
                return round(gene.expressed(values[gene.name] * base))
        return self._num_micro_batches


def _write(group: dict[str, Any], gene: Gene, value: float) -> None:
    """Writes a gene into a parameter group, times what is there if it is relative."""
    key, place = GROUP_KEYS[gene.target]
    if key not in group:
        return
    if place is None:
        group[key] = group[key] * value if gene.relative else value
    else:
        pair = list(group[key])
        pair[place] = pair[place] * value if gene.relative else value
        group[key] = tuple(pair)
