"""The clan on one rank: hooks on a member's engine that turn its steps into rounds.

Every rank of every member runs this. Ranks exchange numbers only at the end of a round: they gather the losses,
decide alike (a decision is a pure function of what was gathered), copy state to the same rank of other members, and
continue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from clantune_scale.checkpoint.durable import DurableRounds
from clantune_scale.checkpoint.opening import Opening
from clantune_scale.config.batch import BatchPlan
from clantune_scale.config.schema import ClanConfig
from clantune_scale.core.consensus import values_in_effect
from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.rounds import PhaseKind, RoundClock, RoundPlan
from clantune_scale.core.strategies import Population, Strategy
from clantune_scale.data.loaders import make_loader, make_sampler, make_window
from clantune_scale.data.sampler import ClanBatchSampler, ClanDataLoader
from clantune_scale.data.watch import BatchWatch, Stopwatch
from clantune_scale.distributed.world import ClanGroups, ClanWorld
from clantune_scale.gradients.nonfinite_mask import NonfiniteMask
from clantune_scale.gradients.probe import GradientProbe
from clantune_scale.results import champion
from clantune_scale.runtime.decisions import agree_on_loss_scale, decide
from clantune_scale.runtime.diagnostics import Diagnostics, gather_diagnostics
from clantune_scale.runtime.engine_protocol import Backend
from clantune_scale.runtime.genome_application import Expression, Setter
from clantune_scale.runtime.measurement import Measurement
from clantune_scale.runtime.phases import PhaseManager
from clantune_scale.runtime.recorder import Recorder, Summary
from clantune_scale.runtime.validation_window import Evaluate, ValidationWindow
from clantune_scale.runtime.view import ClanView, Progress
from clantune_scale.transfer import MemberState, Snapshot, Transfers


class Clan:
    """A member's part of the clan, on one of its ranks.

    The constructor only builds: it talks to no other rank, writes no file and leaves the engine as it is.
    :meth:`start` does the rest.

    Args:
        world: from :func:`clantune_scale.join`, arranged as the engine is.
        backend: the member's engine.
        config: the ``clantune`` block.
        batch: how the clan's batch is divided.
        genes: bound to the engine; equal on all ranks.
        strategy: the rules of the rounds.
        window: the validation window that selection sees.
        evaluate: ``(engine, batch) -> loss`` in place of the model's own loss, or None.
        setters: by target, for genes that the user registers.

    Attributes:
        progress: what the run has come to: population, fitness, snapshots, lineage.
        phases: the clock of the rounds.
        groups: the process groups that cross members.
        transfers: copies of state between members.
        expression: of the genome in this member's engine.
        measurement: losses of all members on common examples, and averaged weights.
        rounds: the run on disk.
        recorder: the run's events.
    """

    def __init__(
        self,
        *,
        world: ClanWorld,
        backend: Backend,
        config: ClanConfig,
        batch: BatchPlan,
        genes: tuple[Gene, ...],
        strategy: Strategy,
        window: ValidationWindow,
        evaluate: Evaluate | None = None,
        setters: Mapping[str, Setter] | None = None,
    ) -> None:
        self.world, self.backend, self.config = world, backend, config
        self.genes, self.strategy, self.progress = genes, strategy, Progress()
        self.phases = PhaseManager(RoundClock(strategy.plan), backend.num_steps)
        self.groups = ClanGroups(world, backend.device.type)
        # A loss scaler expects non-finite gradients now and then, and handles them itself.
        if config.faults.nonfinite_mask and backend.loss_scale() is None:
            self.groups.mask = NonfiniteMask(world.member, config.population_size, self.groups.gradient)
        self.view = ClanView(world, backend, config, batch, genes, strategy, self.phases, self.groups)
        self.transfers = Transfers.of(world, self.groups, config.transfer, runs=Path(config.tracking.directory))
        self.expression = Expression(genes, backend, setters or {})
        self.measurement = Measurement(
            window,
            evaluate,
            backend=backend,
            phases=self.phases,
            replica_group=world.replica_group,
            uses_ema=strategy.uses_ema,
        )
        self._batches, self._clock, self._probe = BatchWatch(world.replica_group), Stopwatch(), GradientProbe()
        self._loader: ClanDataLoader | None = None
        self._summary: Summary | None = None
        self._has_new_plans = False
        self.recorder = Recorder(self.view, self.progress, tokens_per_sample=self.measurement.tokens_per_sample)
        self.rounds = DurableRounds(self.view, self.progress, state=self.state, stop=self.stop, log=self.recorder)

    @property
    def member(self) -> int:
        """The index of this rank's member."""
        return self.world.member

    @property
    def population(self) -> Population:
        """The genomes in effect and the strategy's memory."""
        return self.progress.population

    @property
    def genome(self) -> Genome:
        """This member's."""
        return self.population.genomes[self.member]

    @property
    def fitness(self) -> Fitness:
        """Of the last evaluation."""
        return self.progress.fitness

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

    @property
    def lr_factor(self) -> float:
        """The factor of the final decay on all learning rates in the next step."""
        return self.strategy.lr_factor(self.phases.position.step)

    def state(self) -> MemberState:
        """This rank's live training state, its averaged weights included.

        Raises:
            TransferError: if it is inconsistent, because a transfer into it failed.
        """
        self.transfers.require_whole()
        state = self.backend.state()
        if self.measurement.ema is not None:
            state.tensors += [(f"average.{index}", tensor) for index, tensor in enumerate(self.measurement.ema.tensors)]
        return state

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

    def values(self, kind: PhaseKind) -> list[dict[str, float]]:
        """What each member expresses in such a phase, by member and gene name."""
        return values_in_effect(self.population.genomes, self.genes, kind)

    def sampler(self, num_samples: int, *, shuffle: bool = True) -> ClanBatchSampler:
        """A batch sampler that follows the phases, for a loader of your own (``DataLoader(batch_sampler=...)``).

        Args:
            num_samples: length of the dataset.
            shuffle: whether each epoch has an order of its own, drawn from the clan's seed.
        """
        return self.rounds.follow(make_sampler(self.view, num_samples, accumulation=self.accumulation, shuffle=shuffle))

    def loader(self, dataset: Dataset, **options: Any) -> ClanDataLoader:
        """A data loader over ``dataset`` that follows the phases; ``options`` go to torch's ``DataLoader``.

        Raises:
            ConfigError: if the dataset is not map-style: without an index there is no common window.
        """
        self._loader = make_loader(dataset, self.sampler, on_first=self.rounds.ready_data, **options)
        return self._loader

    def accumulation(self, kind: PhaseKind) -> list[int]:
        """[members] micro-batches per step in such a phase, as far as it is decided now."""
        return [self.expression.accumulation(values) for values in self.values(kind)]

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

    def evaluate(
        self, dataset: Dataset, *, num_samples: int | None = None, collate_fn: Callable | None = None
    ) -> list[float]:
        """Mean loss of each member's present weights on a dataset of your own; all ranks of the clan call it.

        Selection never sees it: give it a test split. After :meth:`finish` it measures the averaged weights if the
        champion was saved with its averaged weights.
        """
        asked = num_samples or len(dataset)
        window = make_window(self.backend, self.config.fitness, dataset, num_samples=asked, collate_fn=collate_fn)
        is_averaged = self._summary is not None and self._summary.averaged
        with self.measurement.averaged_weights() if is_averaged else nullcontext():
            return self.measurement.on(window).mean.tolist()

    def learning_rate(self, step: int) -> float:
        """This member's first learning rate with what it expresses now and the user's schedule as it is now."""
        return self.expression.learning_rate(self.strategy.lr_factor(step))

    def finish(self, *, status: str = "FINISHED") -> Summary:
        """Ends the run: chooses the champion, writes the results, closes tracking, frees the engine.

        All ranks of the clan call it, once; a second call returns the first one's summary. The engine goes on as
        a plain engine inside the member.
        """
        if self._summary is None:
            self.rounds.finish()
            run = self._measured_run()
            summary = champion.write(run, champion.choose(run))
            self.recorder.finish(summary, status=status)
            self.rounds.release()
            self.detach()
            # No rank may leave while another still reads from the store that rank 0 serves.
            self.world.replica_group.gather_json(None)
            self.world.leave()
            self._summary = summary
        return self._summary

    def stop(self) -> str | None:
        """Commits the state as it is, inside a round too, and ends the run so that it can be resumed later.

        All ranks of the clan call it between two optimizer steps. The engine goes on without a clan.

        Returns:
            The name of the committed round, or None if it could not be written; the previous round stays then.
        """
        name = self.rounds.commit()
        self.recorder.stop(name)
        self.rounds.release()
        self.detach()
        return name

    def save_champion(self, folder: Path | None = None) -> Path:
        """Writes the present weights of the member that was best in the last evaluation; the run goes on.

        All ranks of the clan call it, between two optimizer steps.

        Args:
            folder: where to; None for ``champion-step-NNNNNNNN`` in the run's folder.

        Returns:
            The folder, with the forms that ``checkpoint.champion`` lists (safetensors if it lists none).

        Raises:
            ClanError: if no member had a finite loss, or the weights could not be written.
        """
        return champion.save(self._measured_run(), folder)

    def _measured_run(self) -> champion.MeasuredRun:
        self.transfers.require_whole()
        return champion.MeasuredRun(self.view, self.progress, self.measurement, self.recorder.run_dir)

    def detach(self) -> None:
        """Takes every hook off the engine and restores what expression changed between steps."""
        self.backend.detach()
        self.expression.restore()
