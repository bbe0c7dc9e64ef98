"""The rounds of ``clan``: how long each is, which genes it explores, when the genes freeze."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from clantune_scale.core.genome import Gene
from clantune_scale.core.rounds import RoundPlan
from clantune_scale.core.strategies.base import RunFacts
from clantune_scale.core.strategies.clan.group_slopes import sloped_genes
from clantune_scale.core.strategies.clan.lr_trial import LrTrial, is_trial_gene, plan_trial, trial_steps
from clantune_scale.core.strategies.lengths import competitive_steps, phases, round_end
from clantune_scale.core.strategies.options import require


@dataclass(frozen=True)
class ClanOptions:
    """Options of ``clan``.

    Attributes:
        growth: a round is this share of the steps done before it, if that is longer than the round length. An
            older run needs longer to show a difference. At least 0.
        averaging_window: time constant of the averaged weights that fitness is measured on, as a share
            of the steps over which members differ; above 0.
        final_window: the same after the freeze, as a share of the steps that are left then; above 0.
        freeze_at: share of the run after which genes stay still, above 0 and at most 1; without effect
            if the run's length is unknown.
        decay: what happens to learning rates after the freeze: with ``"linear"``, none is above a line from what the
            user's own schedule said at the freeze to zero at the end; ``"none"`` leaves them to that schedule.
        caution: standard errors, over the validation batches, by which the parabola's curvature is raised before
            its minimum is sought, and against which slopes are weighed, so that noise moves nothing far. At
            least 0; 0 takes every fit as it is.
        guard: share of the progress so far, above 0, that may be lost in a round. A round that loses more, and more
            than noise explains, has lost ground; after two in a row, or at once after a blow-up, the clan is rolled
            back to its rollback snapshot (see :mod:`clantune_scale.core.strategies.clan.guard`).
        guard_divisor: what a rollback divides learning rates by; above 1.
        num_reports: rounds (evaluations) after the freeze, at least 1.
        trial_cost: extra gradient evaluations of the learning-rate trial, as a share of the run's own; at least 0. Its
            length follows from it. 0 for no trial, as in a clan of two.
        trial_at: share of the run after which the trial starts, above 0. Before ``freeze_at`` if there is a trial.
        trial_reach: the trial's highest learning rate over the clan's, above 1.
        trial_share: the share of the trial's rise, in log units, that is taken; above 0 and at most 1. A short trial
            likes learning rates that are too high for a long run. A round or two climb what is missing.
        group_slopes: whether learning rates of parameter groups move in the same rounds, each by its own slope, which
            backward passes over the validation window give for all of them at once (``group_slopes.py``). It needs
            members on the line, and one gene on a log scale for each of several groups.
        start_factor: the clan starts with the configured learning rates times this; above 0. The trial only raises
            them, and the damage of a learning rate too high in the first steps is slow to mend.
        prior: factor within which a configured learning rate is believed to be right, at least 1; 1 for no belief. See
            :mod:`clantune_scale.core.strategies.clan.prior`.
        prior_doubt: distance, in log units, within which a round's minimum above the configured learning rate says
            nothing; below it half as much. At least 0.
        prior_pull: share of the way back to it, near it, of a round that asks for no higher rate; at least 0 and at
            most 1.
    """

    growth: float = 0.25
    averaging_window: float = 0.6
    final_window: float = 0.12
    freeze_at: float = 0.4
    decay: Literal["linear", "none"] = "linear"
    caution: float = 1.0
    guard: float = 0.1
    guard_divisor: float = 3.0
    num_reports: int = 10
    trial_cost: float = 0.08
    trial_at: float = 0.07
    trial_reach: float = 13.0
    trial_share: float = 0.9
    start_factor: float = 0.7
    prior: float = 2.0
    prior_doubt: float = 0.3
    prior_pull: float = 0.15
    group_slopes: bool = False

    def __post_init__(self) -> None:
        require(self.growth >= 0, "growth", self.growth, "at least 0")
        require(self.averaging_window > 0, "averaging_window", self.averaging_window, "above 0")
        require(self.final_window > 0, "final_window", self.final_window, "above 0")
        require(0 < self.freeze_at <= 1, "freeze_at", self.freeze_at, "above 0 and at most 1")
        require(self.caution >= 0, "caution", self.caution, "at least 0")
        require(self.guard > 0, "guard", self.guard, "above 0")
        require(self.guard_divisor > 1, "guard_divisor", self.guard_divisor, "above 1")
        require(self.num_reports >= 1, "num_reports", self.num_reports, "at least 1")
        require(self.trial_cost >= 0, "trial_cost", self.trial_cost, "at least 0")
        latest = self.freeze_at if self.trial_cost else 1.0
        require(0 < self.trial_at < latest, "trial_at", self.trial_at, f"above 0 and below {latest}")
        require(self.trial_reach > 1, "trial_reach", self.trial_reach, "above 1")
        require(0 < self.trial_share <= 1, "trial_share", self.trial_share, "above 0 and at most 1")
        require(self.start_factor > 0, "start_factor", self.start_factor, "above 0")
        require(self.prior >= 1, "prior", self.prior, "at least 1")
        require(self.prior_doubt >= 0, "prior_doubt", self.prior_doubt, "at least 0")
        require(0 <= self.prior_pull <= 1, "prior_pull", self.prior_pull, "at least 0 and at most 1")


class ClanPlanner:
    """Plans rounds as a pure function of (index, start step).

    Attributes:
        trial: when the learning-rate trial is, and its learning rates; None if there is none.
    """

    def __init__(self, facts: RunFacts, options: ClanOptions) -> None:
        self._facts = facts
        self._options = options
        self._optimizer = [gene for gene in facts.genes if gene.kind == "optimizer"]
        # A specialized gene shows only in rounds in which members compete.
        self._specialized = [gene for gene in facts.genes if gene.kind == "specialized"] if facts.duty_cycle else []
        #: Learning rates whose slopes are measured.
        self._sloped = sloped_genes(facts.genes) if options.group_slopes else []
        self._trial_steps = trial_steps(facts, at=options.trial_at, cost=options.trial_cost)
        self.trial: LrTrial | None = plan_trial(
            self._trial_steps, population_size=facts.population_size, reach=options.trial_reach
        )

    @property
    def freeze_step(self) -> int | None:
        """The step at which genes freeze; None if the run's length is unknown."""
        total = self._facts.total_steps
        return None if total is None else round(self._options.freeze_at * total)

    @property
    def decay_start_step(self) -> int | None:
        """The step of the freeze; None if no steps are left after it, or if the decay is left to the user."""
        freeze = self.freeze_step
        return freeze if freeze != self._facts.total_steps and self._options.decay == "linear" else None

    @property
    def can_explore(self) -> bool:
        """Whether any round may let members differ; if not, the run is plain data parallelism."""
        return self._facts.population_size > 1 and bool(self._optimizer or self._specialized)

    def plan(self, index: int, start_step: int) -> RoundPlan:
        """Round ``index``, after ``start_step`` optimizer steps: a search, the trial, or a report after the freeze."""
        freeze = self.freeze_step
        if freeze is not None and start_step >= freeze:
            return self._report(index, start_step)
        if self.trial is not None and self.is_trial_at(start_step):
            return self._trial_plan(index, self.trial)
        length = self._length(start_step)
        explored = self._explored(index, start_step)
        if not explored or start_step + length == self._facts.total_steps:
            return RoundPlan(index, start_step, phases(length, 0, keeps=True), evolves=False)
        specialized = explored[0].kind == "specialized"
        competing = competitive_steps(length, self._facts.duty_cycle) if specialized else 0
        if specialized and not competing:
            return RoundPlan(index, start_step, phases(length, 0, keeps=True), evolves=False)
        # The window follows the steps over which members differ: the competitive ones for specialized genes. A window
        # of the whole round would bury them under equal weights. Raw weights would reward any gene value that lowers
        # the noise now (less dropout, a larger batch), as they reward a smaller learning rate. The average goes back
        # with the weights.
        window = max(1, round(self._options.averaging_window * (competing or length)))
        return RoundPlan(
            index,
            start_step,
            phases(length, competing, keeps=False),
            explores=tuple(gene.name for gene in explored),
            uses_ema=True,
            ema_window_steps=window,
            slopes=tuple(gene.name for gene in explored) if explored[0] in self._sloped else (),
        )

    def _length(self, start_step: int) -> int:
        """Steps of the round that starts there, before the freeze. No round crosses the trial's start or end."""
        length = max(self._facts.round_length_steps, int(self._options.growth * start_step))
        trial, boundary = self._trial_steps, self.freeze_step
        if trial is not None and start_step in trial:
            return trial.stop - start_step
        if trial is not None and start_step < trial.start:
            boundary = trial.start
        return round_end(start_step, length, boundary) - start_step

    def is_trial_at(self, start_step: int) -> bool:
        """Whether the round that starts after so many steps is the learning-rate trial."""
        return self.trial is not None and start_step == self.trial.start_step

    def _trial_plan(self, index: int, trial: LrTrial) -> RoundPlan:
        return RoundPlan(
            index,
            trial.start_step,
            (trial.phase,),
            explores=tuple(gene.name for gene in self._facts.genes if is_trial_gene(gene)),
            uses_ema=True,
            ema_window_steps=max(1, round(self._options.averaging_window * trial.num_steps)),
        )

    def _report(self, index: int, start_step: int) -> RoundPlan:
        """A round after the freeze: plain data parallelism, measured so that progress is seen.

        The run's last one evolves: it may roll back.
        """
        total, freeze = self._facts.total_steps, self.freeze_step
        assert total is not None and freeze is not None
        length = max(self._facts.round_length_steps, math.ceil((total - freeze) / self._options.num_reports))
        length = round_end(start_step, length, total) - start_step
        cooperative = phases(length, 0, keeps=True)
        if not self.can_explore:
            return RoundPlan(index, start_step, cooperative, evolves=False)
        # One window for all these rounds, or the average would depend on the rounds' ends.
        window = max(1, round(self._options.final_window * (total - freeze)))
        is_last = start_step + length == total
        return RoundPlan(index, start_step, cooperative, uses_ema=True, ema_window_steps=window, evolves=is_last)

    def _explored(self, index: int, start_step: int) -> list[Gene]:
        """The genes of round ``index``: few enough for a parabola each, in rotation, of one kind.

        If both kinds exist their rounds alternate: members whose weights differ by their optimizer genes cannot be
        compared for what a short competition shows. Until the trial learning rates have all rounds. They matter
        most, and a trial from a learning rate that stayed behind asks for too much.
        """
        if not self.can_explore:
            return []
        count = max(1, (self._facts.population_size - 1) // 2)
        if self._sloped:
            return self._explored_with_slopes(index, start_step, count)
        if self.trial is not None and start_step < self.trial.start_step:
            return _rotation([gene for gene in self._optimizer if is_trial_gene(gene)], index, count)
        kinds = [kind for kind in (self._optimizer, self._specialized) if kind]
        turn, which = divmod(index, len(kinds))
        return _rotation(kinds[which], turn, count)

    def _explored_with_slopes(self, index: int, start_step: int, count: int) -> list[Gene]:
        """All learning rates at once, and the others in turns with them."""
        if self.trial is not None and start_step < self.trial.start_step:
            return self._sloped
        others = [gene for gene in self._optimizer if gene not in self._sloped]
        kinds = [kind for kind in (self._sloped, others, self._specialized) if kind]
        turn, which = divmod(index, len(kinds))
        return self._sloped if which == 0 else _rotation(kinds[which], turn, count)


def _rotation(genes: Sequence[Gene], turn: int, count: int) -> list[Gene]:
    if count >= len(genes):
        return list(genes)
    return [genes[(turn * count + i) % len(genes)] for i in range(count)]
