"""Members on the line: all ranks train one model, and each member is a point or a turn (``core/line.py``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Genome
from clantune_scale.core.line import Line, obstacle, successor
from clantune_scale.core.rounds import PhaseKind, Position, RoundPlan
from clantune_scale.core.strategies import Decision
from clantune_scale.data.watch import LossMeter
from clantune_scale.distributed.one_world import sum_over_world
from clantune_scale.errors import ClanError, ConfigError
from clantune_scale.runtime.diagnostics import Diagnostics
from clantune_scale.runtime.genome_application import group_names
from clantune_scale.runtime.line.evaluation import at_points
from clantune_scale.runtime.line.points import Points
from clantune_scale.runtime.line.refusals import TURNS_REMEDY, may_compete
from clantune_scale.runtime.line.snapshot import TrainingSnapshot
from clantune_scale.runtime.line.turns import Turns, competitors_of
from clantune_scale.runtime.members import MemberParts

TrainStep = Callable[[list[tuple[tuple[Any, ...], dict[str, Any]]]], object]


class OnTheLine:
    """One model that stands for all members.

    While members cooperate it trains at the centre, from which each one's weights are computed. Competitors take turns.

    Args:
        parts: the clan's.
        train_step: does one optimizer step on micro-batches, each the (args, kwargs) of a forward pass of the model;
            None if the loop takes its steps from ``clan.steps()``.

    Attributes:
        turns: of the competitive phase, from its start to the round's end; None otherwise.
    """

    def __init__(self, parts: MemberParts, train_step: TrainStep | None) -> None:
        self._parts, self._train_step = parts, train_step
        self._backend = parts.view.backend
        self._size = parts.view.config.population_size
        self._line: Line | None = None
        self._points: Points | None = None
        self._sloped: tuple[str, ...] = ()
        self._moves = self._may_move()
        self._decays_of: int | None = None
        self._is_driven = False
        self.turns: Turns | None = None
        # Between a round's end and the decision.
        self._ended_points: Points | None = None
        self._ended_turns: Turns | None = None

    @property
    def in_turns(self) -> bool:
        return self.turns is not None and not self.turns.is_first

    @property
    def has_turns(self) -> bool:
        return self.turns is not None and self._parts.view.phases.position.step >= self.turns.end_step

    @property
    def meter(self) -> LossMeter:
        return self.turns.meter if self.turns is not None and self.in_turns else self._parts.progress.losses

    def _may_move(self) -> bool:
        """Whether training may go on from a point. An optimizer that makes copies of the weights shows it by a step."""
        return self._parts.view.config.line.go_on_from == "fittest" and self._backend.moves_with_weights

    def drive(self) -> None:
        self._is_driven = True

    def require_driver(self) -> None:
        if self._is_driven or self._step is not None or not may_compete(self._parts.view.strategy):
            return
        raise ConfigError(
            f"this strategy lets members compete in turns, which this loop does not give them. To do so, {TURNS_REMEDY}"
        )

    @property
    def _step(self) -> TrainStep | None:
        """Does one step of a turn; None if only ``clan.steps()`` can."""
        return self._train_step or self._backend.own_step

    @property
    def _yields_turns(self) -> bool:
        return self._is_driven and self._train_step is None

    def share_gradients(self) -> None:
        """Shows the probe the gradient norm. Gradients are reduced as the engine reduces them."""
        self._backend.show_norm(self._parts.probe)

    @contextmanager
    def updating(self) -> Iterator[None]:
        position, groups = self._parts.view.phases.position, self._backend.param_groups()
        if self.turns is not None:
            self.turns.follow_schedule(position.step, groups)
        with self._parts.expression.during_update(self._parts.lr_factor()):
            # Once in a step, which several optimizers may make together.
            if self._points is not None and self._points.sums_decays and self._decays_of != position.step:
                self._decays_of = position.step
                self._points.before_update(
                    position.step - position.plan.start_step,
                    [float(group["lr"]) for group in groups],
                    [float(group.get("weight_decay", 0.0)) for group in groups],
                    self._backend.in_update(),
                )
            yield

    def equalize(self) -> None:
        """Does nothing: there is one state."""

    def prepare(self, has_begun: bool) -> None:
        self._line = self._points = self.turns = None
        position = self._parts.view.phases.position
        if has_begun and position.phase.kind is PhaseKind.COOPERATIVE:
            self._begin_round(position.plan)

    def saved_turns(self) -> dict[str, Any] | None:
        return None if self.turns is None else self.turns.saved()

    def load_turns(self, saved: dict[str, Any]) -> None:
        self.turns = Turns.of(saved)
        self._parts.expression.express(self.turns.current.values)

    def begin_phase(self, position: Position, *, is_resumed: bool) -> None:
        if position.phase.kind is PhaseKind.COOPERATIVE:
            if position.starts_round and not is_resumed:
                self._begin_round(position.plan)
            assert self._line is not None
            self._parts.expression.express(self._line.centre)
        else:
            self._begin_turns(position)

    def on_batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.turns is not None and not self._yields_turns:
            self.turns.hold((args, kwargs))

    def hold(self, batch: Any) -> None:
        if self.turns is not None and self._yields_turns:
            self.turns.hold(batch)

    def drop_held(self) -> None:
        if self.turns is not None:
            self.turns.drop_held()

    def step_done(self) -> None:
        if self.turns is not None:
            self.turns.step_done()

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        return [] if self._points is None else self._points.tensors()

    def fitness(self, *, averaged: bool) -> Fitness:
        if self.turns is not None:
            turns = self.turns
            ended = [turns.ended[turns.competitor_of(member)].losses for member in range(self._size)]
            return Fitness.from_losses(np.stack(ended))
        measurement = self._parts.measurement
        if self._points is None:
            if self._parts.view.strategy.needs_slopes:
                measurement.require_gradients()
            with measurement.weights(averaged=averaged):
                return Fitness.from_losses(np.stack([measurement.losses()] * self._size))
        assert self._line is not None
        return at_points(
            self._line,
            self._points,
            measurement,
            self._backend,
            genomes=self._parts.progress.population.genomes,
            genes=self._parts.view.genes,
            sloped=self._sloped,
            averaged=averaged,
        )

    def take_turns(self) -> Iterator[list[Any]]:
        """Ends the first turn and goes through the others: yields each step's micro-batches, to be trained on.

        Between two turns the state goes back to the phase's start. The optimizer steps that the caller takes are seen
        by the clan, and not counted.
        """
        turns, parts = self.turns, self._parts
        assert turns is not None
        phase_start = turns.start_step
        self._end_turn(parts.progress.losses.round_losses, is_whole=True)
        while not turns.is_over:
            turns.start.restore(parts.state, self._backend)
            parts.view.phases.rewind(phase_start)
            self._backend.clear_gradients()
            turns.meter.begin_round()
            parts.expression.express(turns.current.values)
            yield from turns.batches()
            # A competitor whose scaled gradients overflowed has skipped steps that the first one took.
            parts.view.phases.rewind(turns.end_step)
            self._end_turn(turns.meter.round_losses, is_whole=False)
        assert turns.streams is not None
        turns.streams.restore(self._backend)

    def run_turns(self) -> bool:
        """Takes all turns by a callable; returns False if ``clan.steps()`` is to take them."""
        if self.turns is None:
            return True
        if self._yields_turns:
            return False
        step = self._step
        if step is None:
            raise ClanError(
                "the loop made its loss of the model's outputs by itself since the competition began, and its turns "
                "cannot be repeated without it. Loop over clan.steps(loader), or pass train_step=... to attach()."
            )
        for batches in self.take_turns():
            before = self._backend.num_steps
            step(batches)
            self._backend.settle()
            if self._backend.num_steps == before and not self._backend.may_skip_steps:
                raise ClanError(
                    f"train_step took no optimizer step after {before}. It has to do one step on the micro-batches "
                    f"that it gets: forward, backward, optimizer.step() (and scheduler.step(), if there is one)."
                )
        return True

    def diagnostics(self, plan: RoundPlan, *, nonfinite_counts: int) -> Diagnostics:
        parts, size = self._parts, self._size
        rate = parts.expression.learning_rate(parts.view.strategy.lr_factor(plan.end_step - 1))
        rates = [rate * point.rates[0] for point in self._line.points] if self._line is not None else [rate] * size
        losses = [parts.progress.losses.round_losses] * size
        if self.turns is not None:
            turns = self.turns
            ended = [turns.ended[turns.competitor_of(member)] for member in range(size)]
            losses, rates = [one.training for one in ended], [one.learning_rate for one in ended]
        unknown = np.full(size, np.nan)
        totals = torch.tensor([[float(nonfinite_counts), *own] for own in losses], dtype=torch.float64)
        totals = totals.to(self._backend.device)
        sum_over_world(totals)
        counts, sums, numbers = totals.cpu().numpy().T
        norm = np.nan if parts.probe.norm is None else parts.probe.norm
        return Diagnostics(
            learning_rate=np.array(rates),
            gradient_norm=np.full(size, norm),
            drift=unknown,
            alignment=unknown,
            nonfinite_counts=counts,
            evaluation_s=np.full(size, parts.measurement.seconds),
            training_loss=np.where(numbers > 0, sums / np.maximum(numbers, 1), np.nan),
        )

    def close_round(self) -> None:
        self._moves = self._may_move()
        self._ended_points, self._points = self._points, None
        self._ended_turns, self.turns = self.turns, None

    def go_on(self, decision: Decision, plan: RoundPlan) -> None:
        points, turns, line = self._ended_points, self._ended_turns, self._line
        self._ended_points = self._ended_turns = self._line = None
        if decision.rolls_back or (points is None and turns is None):
            return
        weights = successor(decision)
        if turns is not None and not turns.keeps:
            return
        if weights is None:
            raise ConfigError(
                "members are to go on from different states, and one model has one. "
                'Choose a strategy that gives all members one state ("clan"), or set members to "groups".'
            )
        if points is not None and self._moves:
            assert line is not None
            points.go_on_from(line.mixed(weights))
            self._backend.refresh()
        elif turns is not None:
            end = turns.end_for(weights)
            if end is not None:
                end.restore(self._parts.state, self._backend)

    def trained(self, genomes: tuple[Genome, ...], plan: RoundPlan) -> tuple[Genome, ...]:
        if self._moves or self._line is None or plan.phases[-1].kind is PhaseKind.COMPETITIVE:
            return genomes
        centre = self._line.centre
        return tuple(Genome({**own.values, **centre}, own.step_sizes) for own in genomes)

    def abort_phase(self) -> bool:
        """A phase of turns is not saved half done: its start is put back, and with it the place in the data."""
        turns, parts = self.turns, self._parts
        if turns is None:
            return False
        turns.start.restore(parts.state, self._backend)
        for sampler, saved in zip(parts.progress.samplers, turns.samplers, strict=False):
            sampler.load_state_dict(saved)
        parts.progress.losses.begin_round(*turns.losses_before)
        parts.view.phases.rewind(turns.start_step)
        self.turns = None
        return True

    def _begin_round(self, plan: RoundPlan) -> None:
        """Finds the centre, and saves the tensors that the points need."""
        parts = self._parts
        genomes, genes = parts.progress.population.genomes, parts.view.genes
        rules = self._backend.decay_rules()
        reason = obstacle(plan, genomes, genes, knows_decay=None not in rules)
        if reason is not None:
            raise ConfigError(f'round {plan.index}: {reason}. Leave that gene out, or set members to "groups".')
        self._line, self._sloped = Line.of(genomes, genes, group_names(self._backend.param_groups())), plan.slopes
        if not (self._line.varies_rate or self._line.varies_decay):
            return
        ema = parts.measurement.ema
        self._points = Points(
            self._backend.masters,
            ema.tensors if ema is not None and plan.uses_ema else None,
            group_of=self._backend.groups_of_masters(),
            line=self._line,
            plan=plan,
            rules=rules,
            moves_weights=self._moves,
            average_every=parts.view.config.line.average_every,
            device=torch.device("cpu") if parts.view.config.line.store == "host" else None,
        )

    def _begin_turns(self, position: Position) -> None:
        parts = self._parts
        competitors = competitors_of(parts.values(position.phase))
        parts.expression.express(competitors[0].values)
        if len(competitors) < 2:
            return
        self.turns = Turns(
            competitors,
            position.step,
            position.step + position.phase.num_steps,
            TrainingSnapshot(parts.state(), self._backend, parts.progress.phase_snapshot),
            parts.progress.losses.round_losses,
            position.phase.keeps,
            [sampler.progress(position.step) for sampler in parts.progress.samplers],
        )

    def _end_turn(self, training: tuple[float, int], *, is_whole: bool) -> None:
        turns, parts = self.turns, self._parts
        assert turns is not None
        if is_whole:  # the run's own meter counts from the round's start
            training = (training[0] - turns.losses_before[0], training[1] - turns.losses_before[1])
        plan = parts.view.phases.clock.at(turns.start_step).plan
        with parts.measurement.weights(averaged=plan.uses_ema):
            losses = parts.measurement.losses()
        rate = parts.expression.learning_rate(parts.view.strategy.lr_factor(plan.end_step - 1))
        turns.end_turn(losses, parts.state, self._backend, training, rate)
