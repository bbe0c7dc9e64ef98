"""The clan on one rank: hooks on a member's engine that turn its steps into rounds.

Every rank of every member runs this. Ranks exchange numbers only at the end of a round: they gather the losses,
decide alike (a decision is a pure function of what was gathered), copy state to the same rank of other members, and
continue.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from clantune_scale.checkpoint.opening import Opening
from clantune_scale.core.rounds import PhaseKind, RoundPlan
from clantune_scale.runtime.built_clan import BuiltClan
from clantune_scale.runtime.decisions import agree_on_loss_scale, decide
from clantune_scale.runtime.diagnostics import Diagnostics, gather_diagnostics
from clantune_scale.transfer import Snapshot


class Clan(BuiltClan):
    """A member's part of the clan, on one of its ranks; :meth:`start` hooks it to the engine."""

    def start(self) -> None:
        """Opens the run on disk, hooks the engine, and begins a new run or resumes one; all ranks of the clan call it.

        A new run begins with copies of member 0's state and the first evaluation.

        Raises:
            CheckpointError: if a run is to be resumed and cannot be.
        """
        opening = self.rounds.open()
        self.recorder.open(opening)
        self.world.follow(opening.run_dir, self.recorder.tracking.suspend)
        self._hook()
        self._begin_run(opening)

    def _begin_run(self, opening: Opening) -> None:
        if opening.content is None:
            self._start_anew()
            self._begin_phase()
        else:
            has_begun = self.rounds.restore()
            self.recorder.resume(opening, self.rounds.sources)
            self._begin_phase(is_resumed=has_begun)
        change = self.world.membership_change
        if change is not None:
            self.recorder.tracking.emit("member_lost", self.phases.position.step, **asdict(change))
        self.rounds.ready()

    def _hook(self) -> None:
        """Hooks the engine: gradients, the optimizer's update, the step's end, batches and losses."""
        backend = self.backend
        size = self.config.population_size
        backend.share_gradients(lambda: self.phases.team(self.member, size), self.groups, self._probe)
        backend.around_update(lambda: self.expression.during_update(self.lr_factor))
        backend.after_step(self._after_step)
        backend.watch(self._batches.on_batch, self._on_loss)

    def _on_loss(self, loss: Any) -> None:
        self.progress.losses.add(loss)
        if self.groups.mask is not None:
            self.groups.mask.observe(loss)

    def _start_anew(self) -> None:
        """All members take member 0's state, are measured once, and get their first genomes."""
        self.transfers.run(self.state(), [0] * self.config.population_size)
        if self.measurement.ema is not None:
            self.measurement.ema.restart()
        self.progress.fitness = self.measurement.fitness(averaged=False)
        self.progress.population = self.strategy.init(self.fitness)
        self._regroup(0, None)
        if self.strategy.guards:
            self.progress.rollback_snapshot = Snapshot(self.state())
        self.recorder.start()

    def _after_step(self) -> None:
        done = self.phases.advance()
        if self.groups.mask is not None:
            self.groups.mask.end_step()
        if self.measurement.ema is not None and done.plan.uses_ema:
            self.measurement.ema.update(done.step + 1, done.plan.ema_window_steps)
        self.recorder.step(done)
        if done.ends_phase:
            self._clock.lap(done.phase.kind.value)
            if done.ends_round:
                self._end_round(done.plan)
            self._begin_phase()
        # The probe costs an all-reduce, so it looks only at the last step of each phase.
        self._probe.is_active = self.phases.position.ends_phase
        self.rounds.step_done()

    def _end_round(self, plan: RoundPlan) -> None:
        """Evaluate, return to the phase snapshot if there is one, decide, transfer, record."""
        progress, measured = self.progress, self.population
        fitness = self.measurement.fitness(averaged=plan.uses_ema)
        self._clock.lap("evaluation")
        diagnostics = self._gather_diagnostics(plan)
        progress.losses.begin_round()
        progress.fitness = replace(fitness, training_loss=diagnostics.clan_training_loss)
        if progress.phase_snapshot is not None:
            progress.phase_snapshot.restore(self.state())
            progress.phase_snapshot = None
        decision = decide(self.strategy, measured, self.fitness, plan, self.world.replica_group)
        if decision.rolls_back and progress.rollback_snapshot is not None:
            progress.rollback_snapshot.restore(self.state())
        self.transfers.run(self.state(), decision.donors, round_index=plan.index)
        if decision.mixing_weights is not None:
            self.transfers.average(self.state(), decision.mixing_weights, round_index=plan.index)
        if self.strategy.guards and decision.takes_snapshot and not decision.rolls_back:
            progress.rollback_snapshot = Snapshot(self.state())
        progress.population = decision.population
        self._regroup(plan.index + 1, measured.teams)
        self._clock.lap("transfer")
        self.recorder.round_end(
            plan,
            measured,
            decision,
            diagnostics,
            seconds=self._clock.empty(),
            complaints=self._batches.compare(),
            scheduled_lr=self.expression.scheduled_rate,
        )
        self._follow_plans()
        self.rounds.round_ended(plan, decision)

    def _gather_diagnostics(self, plan: RoundPlan) -> Diagnostics:
        nonfinite_counts = self.progress.losses.read_nonfinite_counts()
        if self.groups.mask is not None:
            nonfinite_counts += self.groups.mask.read_nonfinite_counts()
        return gather_diagnostics(
            self.view,
            self._probe,
            learning_rate=self.learning_rate(plan.end_step - 1),
            evaluation_s=self.measurement.seconds,
            nonfinite_counts=nonfinite_counts,
            losses=self.progress.losses.round_losses,
        )

    def _begin_phase(self, *, is_resumed: bool = False) -> None:
        """Expresses what the next phase lets members express; a resumed phase has begun before."""
        position = self.phases.position
        phase = position.phase
        self._probe.is_active = position.ends_phase
        if is_resumed:
            self.expression.express(self.values(phase.kind)[self.member], batch_factor=phase.batch_factor)
            return
        ema = self.measurement.ema
        if ema is not None and position.starts_round and position.plan.uses_ema and not self.phases.averaged_before:
            ema.restart()
        if not phase.keeps and self.progress.phase_snapshot is None:
            self.progress.phase_snapshot = Snapshot(self.state())
        self.expression.express(self.values(phase.kind)[self.member], batch_factor=phase.batch_factor)
        if phase.kind is PhaseKind.COOPERATIVE:
            agree_on_loss_scale(self.backend, self.world.replica_group)
        self._batches.begin(phase)
        self.recorder.phase_start(position)

    def _regroup(self, index: int, before: tuple[int, ...] | None) -> None:
        """From round ``index`` on, the teams are the population's; they were ``before``."""
        if self.population.teams != before:
            self.phases.regroup(index, self.population.teams)
            self._has_new_plans = True

    def _follow_plans(self) -> None:
        """Drops batches that were prefetched for plans that have changed since."""
        moves_batch = any(gene.target == "accumulation" for gene in self.genes)
        if self._loader is not None and (moves_batch or self._has_new_plans):
            self._loader.replan()
        self._has_new_plans = False
