"""Who carries the members of a clan out: groups of ranks that each train one, or one model that stands for all.

The clan makes rounds and decides; what differs between the two forms is behind :class:`Members`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from clantune_scale.core.consensus import values_in_effect
from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Genome
from clantune_scale.core.rounds import Phase, Position, RoundPlan
from clantune_scale.core.strategies import Decision
from clantune_scale.data.watch import LossMeter
from clantune_scale.gradients.probe import GradientProbe
from clantune_scale.runtime.diagnostics import Diagnostics, gather_diagnostics
from clantune_scale.runtime.genome_application import Expression
from clantune_scale.runtime.measurement import Measurement
from clantune_scale.runtime.view import ClanView, Progress
from clantune_scale.transfer import MemberState, Transfers


@dataclass(frozen=True)
class MemberParts:
    """What both forms use of a clan on one rank.

    Attributes:
        view: the clan as its parts see it.
        progress: of the run.
        expression: of genes in the engine.
        measurement: of losses, and the averaged weights.
        probe: of gradients.
        state: gives the live training state.
    """

    view: ClanView
    progress: Progress
    expression: Expression
    measurement: Measurement
    probe: GradientProbe
    state: Callable[[], MemberState]

    def values(self, phase: Phase) -> list[dict[str, float]]:
        """[members] by gene: what each expresses in a phase."""
        return values_in_effect(self.progress.population.genomes, self.view.genes, phase.kind)

    def lr_factor(self) -> float:
        """The final decay's factor in the next step."""
        return self.view.strategy.lr_factor(self.view.phases.position.step)


class Members(Protocol):
    """The members, as a clan's rounds use them. All ranks of the clan call each method alike."""

    @property
    def in_turns(self) -> bool:
        """Whether the steps that are taken now repeat a phase for another competitor. The run does not count them."""

    @property
    def has_turns(self) -> bool:
        """Whether a phase has ended for the loop whose turns are not all taken."""

    @property
    def meter(self) -> LossMeter:
        """Of the training losses that come now."""

    def drive(self) -> None:
        """Says that the loop takes its steps from ``clan.steps()``, which can take turns."""

    def require_driver(self) -> None:
        """After the first step: checks that turns can be taken in this loop.

        Raises:
            ConfigError: if they cannot, and will come.
        """

    def share_gradients(self) -> None:
        """Hooks the engine's reduction of gradients, if gradients cross members."""

    def updating(self) -> AbstractContextManager[None]:
        """The context of the optimizer's own update."""

    def equalize(self) -> None:
        """Gives all members one state: member 0's."""

    def prepare(self, has_begun: bool) -> None:
        """Makes the arrays of the round in which a resumed run was stopped; their values are loaded afterwards."""

    def begin_phase(self, position: Position, *, is_resumed: bool) -> None:
        """Expresses what the phase lets members express."""

    def saved_turns(self) -> dict[str, Any] | None:
        """The competitive phase so far, if it has turns and is in its first."""

    def load_turns(self, saved: dict[str, Any]) -> None:
        """Goes on with a phase that :meth:`saved_turns` told of."""

    def on_batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Sees the arguments of a training forward pass."""

    def hold(self, batch: Any) -> None:
        """Sees a micro-batch that ``clan.steps()`` is about to give to the loop."""

    def drop_held(self) -> None:
        """Forgets the micro-batches of a step that was skipped."""

    def step_done(self) -> None:
        """Ends a step that the run counts."""

    def run_turns(self) -> bool:
        """Takes all turns, at a phase's end; returns False if they are left to :meth:`take_turns`."""

    def take_turns(self) -> Iterator[list[Any]]:
        """Yields the micro-batches of each step of the turns after the first, to be trained on."""

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """The arrays of the round so far, by name, beside the engine's state and the averages."""

    def fitness(self, *, averaged: bool) -> Fitness:
        """The members' losses on the common window."""

    def diagnostics(self, plan: RoundPlan, *, nonfinite_counts: int) -> Diagnostics:
        """The members' diagnostics of a round."""

    def close_round(self) -> None:
        """Ends a round's measurements: from here on the state is the engine's and the averages."""

    def go_on(self, decision: Decision, plan: RoundPlan) -> None:
        """Gives each member the state that the decision gives it. If it rolls back, the clan has done so already."""

    def trained(self, genomes: tuple[Genome, ...], plan: RoundPlan) -> tuple[Genome, ...]:
        """[members] the genome that each one's state was trained with, for the lineage; called before :meth:`go_on`."""

    def abort_phase(self) -> bool:
        """Goes back to the phase's start if the phase cannot be saved half done; returns whether it did."""


class InGroups:
    """Members that are groups of ranks: gradients, losses and states cross them by collectives.

    Args:
        parts: the clan's.
        transfers: copies of state between members.
    """

    in_turns = has_turns = False

    def __init__(self, parts: MemberParts, transfers: Transfers) -> None:
        self._parts, self._transfers = parts, transfers
        self._has_looked = False

    @property
    def meter(self) -> LossMeter:
        return self._parts.progress.losses

    def drive(self) -> None:
        """Does nothing: members train at once."""

    def require_driver(self) -> None:
        """Does nothing: members train at once."""

    def share_gradients(self) -> None:
        view = self._parts.view
        size = view.config.population_size
        view.backend.share_gradients(lambda: view.phases.team(view.member, size), view.groups, self._parts.probe)

    def updating(self) -> AbstractContextManager[None]:
        return self._parts.expression.during_update(self._parts.lr_factor())

    def equalize(self) -> None:
        self._transfers.run(self._parts.state(), [0] * self._parts.view.config.population_size)

    def prepare(self, has_begun: bool) -> None:
        """Does nothing: the state is the engine's and the averages."""

    def saved_turns(self) -> dict[str, Any] | None:
        return None

    def load_turns(self, saved: dict[str, Any]) -> None:
        """Does nothing: all members train at once."""

    def begin_phase(self, position: Position, *, is_resumed: bool) -> None:
        phase = position.phase
        own = self._parts.values(phase)[self._parts.view.member]
        self._parts.expression.express(own, batch_factor=phase.batch_factor)

    def on_batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Does nothing: no batch is used twice."""

    def hold(self, batch: Any) -> None:
        """Does nothing: no batch is used twice."""

    def drop_held(self) -> None:
        """Does nothing: no batch is used twice."""

    def step_done(self) -> None:
        """After the first step, looks for optimizer state that no clone would move: most of it exists only now."""
        if not self._has_looked:
            self._has_looked = True
            self._parts.state()

    def run_turns(self) -> bool:
        return True

    def take_turns(self) -> Iterator[list[Any]]:
        return iter(())

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        return []

    def fitness(self, *, averaged: bool) -> Fitness:
        return self._parts.measurement.fitness(averaged=averaged)

    def diagnostics(self, plan: RoundPlan, *, nonfinite_counts: int) -> Diagnostics:
        parts = self._parts
        return gather_diagnostics(
            parts.view,
            parts.probe,
            learning_rate=parts.expression.learning_rate(parts.view.strategy.lr_factor(plan.end_step - 1)),
            evaluation_s=parts.measurement.seconds,
            nonfinite_counts=nonfinite_counts,
            losses=parts.progress.losses.round_losses,
        )

    def close_round(self) -> None:
        """Does nothing: no array belongs to a round."""

    def go_on(self, decision: Decision, plan: RoundPlan) -> None:
        self._transfers.run(self._parts.state(), decision.donors, round_index=plan.index)
        if decision.mixing_weights is not None:
            self._transfers.average(self._parts.state(), decision.mixing_weights, round_index=plan.index)

    def trained(self, genomes: tuple[Genome, ...], plan: RoundPlan) -> tuple[Genome, ...]:
        return genomes

    def abort_phase(self) -> bool:
        return False
