"""The reference clan's members on the line: one model in place of P, slowly and obviously.

While members cooperate, the model trains at the centre and each member's weights are computed at the round's end
(:mod:`clantune_scale.core.line`). If they compete, they take turns: each trains the whole phase from one snapshot, on
the same batches. All go on from the state of the one that the decision names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from clantune_scale.core.fitness import Slopes
from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.line import Line, Point, obstacle, slope_members, slopes_of, successor
from clantune_scale.core.rounds import Phase, PhaseKind, Position, RoundPlan
from clantune_scale.core.strategies.base import Decision
from clantune_scale.errors import ConfigError
from clantune_scale.reference.member import Member, Saved
from clantune_scale.runtime.line.decays import decay_rule
from clantune_scale.runtime.line.points import Points

Values = Mapping[str, float]


@dataclass(frozen=True)
class Calls:
    """What the clan does for a single model.

    Attributes:
        backward: (member, step, phase, share) adds that member's mean gradient times ``share``; the batch is its own.
        update: (values, step) clips and applies the gradient with these genes, and steps the user's schedule.
        express: (values) sets what the optimizer does not hold.
        rates: (values, step) to [groups] learning rates and [groups] weight decays in that update.
        losses: (averaged) on the common window, of the model as it is.
        gradients: by batch of the common window, the gradients of its loss by the parameters, of the model as it is.
    """

    backward: Callable[[int, int, Phase, float], None]
    update: Callable[[Values, int], None]
    express: Callable[[Values], None]
    rates: Callable[[Values, int], tuple[list[float], list[float]]]
    losses: Callable[[bool], list[float]]
    gradients: Callable[[], Iterator[list[torch.Tensor | None]]]


class OnTheLine:
    """One model that stands for all members.

    Args:
        model: trains at the centre, and in turns.
        genes: all of the clan's.
        population_size: members that it stands for.
        calls: the clan's.
    """

    def __init__(self, model: Member, *, genes: Sequence[Gene], population_size: int, calls: Calls) -> None:
        self._model, self._genes, self._size, self._calls = model, genes, population_size, calls
        groups = model.optimizer.param_groups
        self._groups = [str(group.get("name", index)) for index, group in enumerate(groups)]
        places = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
        # A parameter that the optimizer does not have does not move, whatever its group.
        self._group_of = [places.get(id(p), 0) for p in model.parameters]
        self._line = self._still()
        self._points: Points | None = None
        self._turns: list[Saved] | None = None

    def begin_round(self, plan: RoundPlan, genomes: Sequence[Genome]) -> None:
        """Finds the centre, and saves the tensors that the points need.

        Raises:
            ConfigError: if one model cannot stand for all members in this round.
        """
        rules = [decay_rule(self._model.optimizer, group) for group in self._model.optimizer.param_groups]
        reason = obstacle(plan, genomes, self._genes, knows_decay=None not in rules)
        if reason is not None:
            raise ConfigError(f'round {plan.index}: {reason}. Leave that gene out, or set members to "groups".')
        self._points, self._turns, self._line = None, None, self._still()
        if plan.phases[0].kind is PhaseKind.COMPETITIVE:
            return
        self._line = Line.of(genomes, self._genes, self._groups)
        if self._line.varies_rate or self._line.varies_decay:
            self._points = Points(
                lambda: self._model.parameters,
                self._model.average if plan.uses_ema else None,
                group_of=self._group_of,
                line=self._line,
                plan=plan,
                rules=rules,
            )

    def step(self, position: Position, values: Sequence[Values]) -> None:
        """One optimizer step of the centre; if members compete, the phase's last one takes all their turns.

        Args:
            position: of the step.
            values: [members] in effect in the phase.
        """
        if position.phase.kind is PhaseKind.COOPERATIVE:
            self._cooperate(position)
        elif position.ends_phase:
            first = position.step - position.offset
            self._take_turns(position.plan, position.phase, range(first, position.step + 1), values)

    def losses(self, averaged: bool) -> list[list[float]]:
        """[members][batches] on the common window; the model is left as it was."""
        if self._turns is not None:
            now = self._model.save()
            losses = [self._losses_of(turn, averaged) for turn in self._turns]
            self._model.load(now)
            return losses
        if self._points is None:
            return [self._calls.losses(averaged)] * self._size
        with self._points.held() as write:
            measured = []
            for member in range(self._size):
                write(member, averaged)
                measured.append(self._calls.losses(False))
            return measured

    def slopes(self, plan: RoundPlan, genomes: Sequence[Genome]) -> Slopes | None:
        """Of the genes that the plan names, at the averages of the members with their lowest and highest values."""
        if not plan.slopes or self._points is None:
            return None
        members = slope_members(genomes, plan.slopes[0])
        tables = []
        with self._points.held() as write:
            for member in members:
                write(member, True)
                tables.append([self._points.slopes(member, own).tolist() for own in self._calls.gradients()])
        return slopes_of(members, tables, plan.slopes, self._genes, self._groups)

    def go_on(self, decision: Decision, *, rolled_back: bool) -> None:
        """The model goes to the one state that all members have from now on.

        Args:
            decision: of the round. If it rolls back, the model is in the snapshot's state already.
            rolled_back: whether members are back in the state from which they took their turns.

        Raises:
            ConfigError: if members are to go on from different states.
        """
        points, turns = self._points, None if rolled_back else self._turns
        self._points = self._turns = None
        if decision.rolls_back or (points is None and turns is None):
            return
        weights = successor(decision)
        if turns is not None and all(turn is turns[0] for turn in turns):
            weights = (1.0, *[0.0] * (self._size - 1))
        if weights is None:
            raise ConfigError(
                "members are to go on from different states, and one model has one. "
                'Choose a strategy that gives all members one state ("clan"), or set members to "groups".'
            )
        if points is not None:
            points.go_on_from(self._line.mixed(weights))
        elif turns is not None:
            if max(weights) != 1.0:
                raise ConfigError('one model cannot average states that parted in turns. Set members to "groups".')
            self._model.load(turns[weights.index(1.0)])

    def _still(self) -> Line:
        """All members at the centre."""
        count = len(self._groups)
        return Line({}, (Point((1.0,) * count, (0.0,) * count),) * self._size)

    def _cooperate(self, position: Position) -> None:
        centre = self._line.centre
        self._calls.express(centre)
        self._model.optimizer.zero_grad()
        for member in range(self._size):
            self._calls.backward(member, position.step, position.phase, 1.0 / self._size)
        if self._points is not None:
            rates, decays = self._calls.rates(centre, position.step)
            self._points.before_update(position.step - position.plan.start_step, rates, decays)
        self._calls.update(centre, position.step)
        self._average(position.plan, position.step)

    def _take_turns(self, plan: RoundPlan, phase: Phase, steps: range, values: Sequence[Values]) -> None:
        """Each team trains the phase from the same snapshot. Members with equal genomes are one team.

        Every turn is on the clan's whole batch, as a loop's steps are, also in a phase in which a member in groups
        reads only its own part of it.

        The user's schedule and the random stream are set back with the snapshot, because every turn is the same
        stretch of the run. They end as after a single turn.
        """
        # Without teams all read the same batches, and equal genomes end in equal states: the first of them trains.
        teams = phase.teams or tuple(values.index(own) for own in values)
        whole = phase if phase.teams else replace(phase, batch_factor=self._size)
        start, schedule, stream = self._model.save(), self._schedule(), torch.get_rng_state()
        ends: dict[int, Saved] = {}
        for team in dict.fromkeys(teams):
            self._model.load(start)
            self._set_schedule(schedule)
            torch.set_rng_state(stream)
            mates = [member for member in range(self._size) if teams[member] == team] if phase.teams else [team]
            self._calls.express(values[mates[0]])
            for step in steps:
                self._model.optimizer.zero_grad()
                for mate in mates:
                    self._calls.backward(mate, step, whole, 1.0 / len(mates))
                self._calls.update(values[mates[0]], step)
                self._average(plan, step)
            ends[team] = self._model.save()
        self._turns = [ends[team] for team in teams]

    def _losses_of(self, turn: Saved, averaged: bool) -> list[float]:
        self._model.load(turn)
        return self._calls.losses(averaged)

    def _average(self, plan: RoundPlan, step: int) -> None:
        if plan.uses_ema:
            self._model.update_average(step + 1, plan.ema_window_steps)

    def _schedule(self) -> tuple[Any, list[dict[str, Any]]]:
        """The user's scheduler, and the hyperparameters as it has left them."""
        groups = self._model.optimizer.state_dict()["param_groups"]
        state = None if self._model.scheduler is None else self._model.scheduler.state_dict()
        return copy.deepcopy((state, groups))

    def _set_schedule(self, saved: tuple[Any, list[dict[str, Any]]]) -> None:
        state, groups = copy.deepcopy(saved)
        if state is not None:
            self._model.scheduler.load_state_dict(state)
        for group, before in zip(self._model.optimizer.param_groups, groups, strict=True):
            group.update({key: value for key, value in before.items() if key != "params"})
