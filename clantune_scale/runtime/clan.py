"""The clan on one rank: hooks on a member's engine that turn its steps into rounds.

Every rank of every member runs this. Ranks exchange numbers only at the end of a round: they gather the losses,
decide alike (a decision is a pure function of what was gathered), copy state to the same rank of other members, and
continue.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from clantune_scale.checkpoint.in_loop import load_state, state_of
from clantune_scale.checkpoint.opening import Opening
from clantune_scale.checkpoint.restore import Target
from clantune_scale.core.rounds import PhaseKind, Position, RoundPlan
from clantune_scale.errors import ClanError, ConfigError
from clantune_scale.runtime.built_clan import BuiltClan
from clantune_scale.runtime.decisions import agree_on_loss_scale, decide
from clantune_scale.runtime.diagnostics import Diagnostics
from clantune_scale.runtime.steps import Step, endless, new_step, repeated_step
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
            self._has_begun = True
            self.recorder.resume(opening, self.rounds.sources)
            self._begin_phase(is_resumed=has_begun)
        change = self.world.membership_change
        if change is not None:
            self.recorder.tracking.emit("member_lost", self.phases.position.step, **asdict(change))
        self.rounds.ready()

    def _hook(self) -> None:
        """Hooks the engine: gradients, the optimizer's update, the step's end, batches and losses."""
        self.members.share_gradients()
        self.backend.around_update(self.members.updating)
        self.backend.after_step(self._after_step)
        self.backend.after_skip(self.members.drop_held)
        if self._watch is None:
            self.backend.watch(self._on_batch, self._on_loss)
        else:
            self._unwatch = self._watch(self._on_shown_batch, self._on_loss)
        self.backend.after_resize(1 if self.view.has_one_state else self.config.population_size, self._resized)
        self.backend.after_load(self._loaded)

    def _resized(self, accumulation: int) -> None:
        """The script has changed the batch size."""
        self.expression.follow(accumulation)
        if self._loader is not None:
            self._loader.replan()

    def _loaded(self) -> None:
        """The script has loaded a checkpoint of a run without a clan. The clan begins anew with what it holds.

        Raises:
            ClanError: if the clan has trained, or goes on from a round of its own.
        """
        if self._has_begun:
            raise ClanError(
                f"a checkpoint was loaded at step {self.num_steps} of a clan that has trained: the population, the "
                f"averages and the rollback snapshot are of other weights. Load it right after initialize() or "
                f"attach(), before the first step; to go on from a round of the clan, set checkpoint.resume and load "
                f"nothing."
            )
        self.phases.begin(self.backend.num_steps)
        for sampler in self.progress.samplers:
            sampler.begin(self.backend.num_steps)
        if self._loader is not None:
            self._loader.replan()
        self.progress.phase_snapshot = None
        self._measure_start()
        self._begin_phase()

    def _on_shown_batch(self, args: tuple, kwargs: dict) -> None:
        self.backend.settle()  # No forward pass of the model as it is attached may come to say that the loop goes on.
        self._on_batch(args, kwargs)

    def _on_batch(self, args: tuple, kwargs: dict) -> None:
        if not self.members.in_turns:
            self._batches.on_batch(args, kwargs)
            self.members.on_batch(args, kwargs)

    def _on_loss(self, loss: Any) -> None:
        self.members.meter.add(loss)
        if self.groups.mask is not None:
            self.groups.mask.observe(loss)

    def _start_anew(self) -> None:
        """All members take one state, are measured once, and get their first genomes."""
        self._measure_start()
        self.recorder.start()

    def _measure_start(self) -> None:
        self.members.equalize()
        if self.measurement.ema is not None:
            self.measurement.ema.restart()
        self.progress.fitness = self.members.fitness(averaged=False)
        self.progress.population = self.strategy.init(self.fitness)
        self._regroup(0, None)
        if self.strategy.guards:
            self.progress.rollback_snapshot = Snapshot(self.state())

    def _after_step(self) -> None:
        done = self.phases.advance()
        self._has_begun = True
        if self.groups.mask is not None:
            self.groups.mask.end_step()
        if self.measurement.ema is not None and done.plan.uses_ema:
            self.measurement.ema.after_step(done)
        if self.members.in_turns:
            self.rounds.step_done()
            return
        self.members.require_driver()
        self.members.step_done()
        self.recorder.step(done)
        if done.ends_phase and not self.members.run_turns():
            return  # clan.steps() takes the turns, and ends the phase
        self._step_counted(done)

    def _step_counted(self, done: Position) -> None:
        """What follows a step of the run, with its turns if it was the last of a phase that has turns."""
        if done.ends_phase:
            self._clock.lap(done.phase.kind.value)
            if done.ends_round:
                self._end_round(done.plan)
            self._begin_phase()
        if not self._is_past_end and self.strategy.lr_factor(done.step) == 0:
            self._is_past_end = True
            self.recorder.warn(
                f"training goes on past total_steps ({self.strategy.facts.total_steps}), where the final decay has "
                f"brought all learning rates to 0: these steps change nothing. Set total_steps to the length of the "
                f"whole run before it starts."
            )
        # The probe costs an all-reduce, so it looks only at the last step of each phase.
        self._probe.is_active = self.phases.position.ends_phase
        self.rounds.step_done()

    def steps(self, loader: Iterable[Any], *, until: int | None = None) -> Iterator[Step]:
        """One :class:`Step` for each optimizer step, over ``loader`` again and again.

        If members on the line take turns, the steps of the turns come between two steps of the run, on batches that
        came before. :attr:`num_steps` does not count them.

        Args:
            loader: gives micro-batches; :meth:`loader` makes one that follows the phases.
            until: optimizer steps of the whole run; None goes on without end.

        Raises:
            ClanError: if the loop's body took no optimizer step.
        """
        batches = endless(loader)
        self.members.drive()
        while until is None or self.num_steps < until:
            done = self.phases.position
            yield from new_step(self.backend, batches, self.members.hold)
            if self.members.has_turns:
                for repeated in self.members.take_turns():
                    yield from repeated_step(self.backend, repeated)
                self._step_counted(done)

    def state_dict(self) -> dict[str, Any]:
        """What this rank of a clan on the line adds to a checkpoint of the loop's own, between two optimizer steps.

        The loop saves model, optimizer, scheduler and random streams itself. Inside a competitive phase, the batches
        since its start are part of it. It holds tensors in host memory, numbers, texts and what batches hold, so that
        ``torch.load(..., weights_only=True)`` reads it. Each rank saves its own.

        Raises:
            ConfigError: if members are groups, whose rounds are saved by the clan (``checkpoint.every_rounds``).
        """
        if self.config.members != "line":
            raise ConfigError(
                'members in groups have a state each, which no checkpoint of the loop holds. Set "members" to "line", '
                "or resume from the clan's own rounds (checkpoint.resume)."
            )
        self.backend.settle()
        return {**state_of(self._target), "turns": self.members.saved_turns()}

    def load_state_dict(self, saved: Mapping[str, Any], *, source: str) -> None:
        """Goes on from the result of :meth:`state_dict`. The loop has loaded model, optimizer and scheduler before.

        All ranks of the clan call it, before the first optimizer step after attaching.

        Args:
            saved: this rank's.
            source: where it was found, for the run's events.

        Raises:
            CheckpointError: if it was saved with other settings, or of another model.
        """
        self.backend.settle()  # The loop's own loads would begin the clan anew with the next forward pass.
        position = load_state(self._target, saved)
        if saved["turns"] is None:
            self._begin_phase(is_resumed=True)
        else:
            self._probe.is_active = position.ends_phase
            self.members.load_turns(saved["turns"])
        self._batches.begin(position.phase)
        self.recorder.go_on(source)

    @property
    def _target(self) -> Target:
        return Target(self.view, self.progress, self.state, self.members.prepare)

    def _end_round(self, plan: RoundPlan) -> None:
        """Evaluate, return to the phase snapshot if there is one, decide, transfer, record."""
        progress, measured = self.progress, self.population
        fitness = self.members.fitness(averaged=plan.uses_ema)
        self._clock.lap("evaluation")
        diagnostics = self._diagnostics(plan)
        self.members.close_round()
        progress.losses.begin_round()
        progress.fitness = replace(fitness, training_loss=diagnostics.clan_training_loss)
        if progress.phase_snapshot is not None:
            progress.phase_snapshot.restore(self.state)
            progress.phase_snapshot = None
        trained = self.members.trained(measured.genomes, plan)
        decision = decide(self.strategy, measured, self.fitness, plan, self.world.replica_group)
        if decision.rolls_back and progress.rollback_snapshot is not None:
            progress.rollback_snapshot.restore(self.state)
        self.members.go_on(decision, plan)
        if self.strategy.guards and decision.takes_snapshot and not decision.rolls_back:
            progress.rollback_snapshot = Snapshot(self.state(), progress.rollback_snapshot)
        progress.population = decision.population
        self._regroup(plan.index + 1, measured.teams)
        self._clock.lap("transfer")
        self.recorder.round_end(
            plan,
            measured,
            decision,
            diagnostics,
            trained=trained,
            seconds=self._clock.empty(),
            complaints=self._batches.compare(),
            scheduled_lr=self.expression.scheduled_rate,
        )
        self._follow_plans()
        self.rounds.round_ended(plan, decision)

    def _diagnostics(self, plan: RoundPlan) -> Diagnostics:
        nonfinite_counts = self.progress.losses.read_nonfinite_counts()
        if self.groups.mask is not None:
            nonfinite_counts += self.groups.mask.read_nonfinite_counts()
        return self.members.diagnostics(plan, nonfinite_counts=nonfinite_counts)

    def _begin_phase(self, *, is_resumed: bool = False) -> None:
        """Expresses what the next phase lets members express; a resumed phase has begun before."""
        position = self.phases.position
        phase = position.phase
        self._probe.is_active = position.ends_phase
        if is_resumed:
            self.members.begin_phase(position, is_resumed=True)
            return
        ema = self.measurement.ema
        if ema is not None and position.starts_round and position.plan.uses_ema and not self.phases.averaged_before:
            ema.restart()
        if not phase.keeps and self.progress.phase_snapshot is None:
            self.progress.phase_snapshot = Snapshot(self.state())
        self.members.begin_phase(position, is_resumed=False)
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
