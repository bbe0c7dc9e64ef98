"""A clan on one rank as its constructor builds it; :mod:`clantune_scale.runtime.clan` makes its rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from clantune_scale.checkpoint.durable import DurableRounds
from clantune_scale.config.batch import BatchPlan
from clantune_scale.config.schema import ClanConfig
from clantune_scale.core.consensus import values_in_effect
from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Gene, Genome
from clantune_scale.core.rounds import PhaseKind, RoundClock
from clantune_scale.core.strategies import Population, Strategy
from clantune_scale.data.sampler import ClanBatchSampler, ClanDataLoader
from clantune_scale.data.watch import BatchWatch, Stopwatch
from clantune_scale.distributed.world import ClanGroups, ClanWorld
from clantune_scale.gradients.nonfinite_mask import NonfiniteMask
from clantune_scale.gradients.probe import GradientProbe
from clantune_scale.results import champion
from clantune_scale.results.champion import Summary
from clantune_scale.runtime.engine_protocol import Backend
from clantune_scale.runtime.genome_application import Expression, Setter
from clantune_scale.runtime.line.members import OnTheLine, TrainStep
from clantune_scale.runtime.loaders import make_loader, make_sampler, make_window
from clantune_scale.runtime.measurement import Measurement
from clantune_scale.runtime.members import InGroups, MemberParts, Members
from clantune_scale.runtime.phases import PhaseManager
from clantune_scale.runtime.recorder import Recorder
from clantune_scale.runtime.steps import Watch
from clantune_scale.runtime.validation_window import Evaluate, ValidationWindow
from clantune_scale.runtime.view import ClanView, Progress
from clantune_scale.tracking import FAILED
from clantune_scale.transfer import MemberState, Transfers


class BuiltClan:
    """A member's part of the clan, before it starts: its parts, what can be asked of it, and how a run ends.

    The constructor only builds: it talks to no other rank, writes no file and leaves the engine as it is.

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
        train_step: does one optimizer step, for members on the line that take turns; None if the loop does not give
            one.
        watch: shows the clan micro-batches and losses; None watches the model's forward pass.

    Attributes:
        progress: what the run has come to: population, fitness, snapshots, lineage.
        phases: the clock of the rounds.
        groups: the process groups that cross members.
        transfers: copies of state between members.
        expression: of the genome in this member's engine.
        measurement: losses of all members on common examples, and averaged weights.
        members: who carries the members out: groups of ranks, or one model.
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
        train_step: TrainStep | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.world, self.backend, self.config = world, backend, config
        self.genes, self.strategy, self.progress = genes, strategy, Progress()
        is_line = config.members == "line"
        self.phases = PhaseManager(RoundClock(strategy.plan, backend.num_steps), backend.num_steps)
        self.groups = ClanGroups(world, backend.device.type)
        # A loss scaler expects non-finite gradients now and then, and handles them itself.
        if config.faults.nonfinite_mask and backend.loss_scale() is None and not is_line:
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
            # An optimizer with an evaluation mode has averages of its own, which are measured and saved instead.
            uses_ema=strategy.uses_ema and (is_line or not backend.has_inference_weights),
            average_every=config.line.average_every if is_line else 1,
            average_device=torch.device("cpu") if is_line and config.line.store == "host" else None,
        )
        self._batches, self._clock, self._probe = BatchWatch(world.replica_group), Stopwatch(), GradientProbe()
        parts = MemberParts(
            self.view, self.progress, self.expression, self.measurement, self._probe, lambda: self.state()
        )
        self.members: Members = OnTheLine(parts, train_step) if is_line else InGroups(parts, self.transfers)
        self._loader: ClanDataLoader | None = None
        self._watch = watch
        self._unwatch: Callable[[], None] | None = None
        self._summary: Summary | None = None
        self._has_new_plans = self._has_begun = self._is_past_end = False
        self.recorder = Recorder(self.view, self.progress, tokens_per_sample=self.measurement.tokens_per_sample)
        self.rounds = DurableRounds(
            self.view,
            self.progress,
            state=self.state,
            prepare=self.members.prepare,
            stop=self.stop,
            log=self.recorder,
        )

    @property
    def member(self) -> int:
        """The index of this rank's member."""
        return self.world.member

    @property
    def num_steps(self) -> int:
        """Optimizer steps that are done, skipped ones among them."""
        return self.backend.num_steps

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

    @property
    def lr_factor(self) -> float:
        """The factor of the final decay on all learning rates in the next step."""
        return self.strategy.lr_factor(self.phases.position.step)

    def state(self) -> MemberState:
        """This rank's live training state, its averaged weights included.

        Raises:
            TransferError: if it is inconsistent, because a transfer into it failed.
        """
        self.transfers.require_consistent()
        state = self.backend.state()
        if self.measurement.ema is not None:
            state.tensors += [(f"average.{index}", tensor) for index, tensor in enumerate(self.measurement.ema.tensors)]
        state.tensors += self.members.tensors()
        state.reread = self.state
        return state

    def values(self, kind: PhaseKind) -> list[dict[str, float]]:
        """What each member expresses in a phase of that kind, by member and gene name."""
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
        self._loader = make_loader(
            dataset, self.sampler, on_first=self.rounds.ready_data, on_next=self.backend.settle, **options
        )
        return self._loader

    def accumulation(self, kind: PhaseKind) -> list[int]:
        """[members] micro-batches per step in a phase of that kind, by the present genomes."""
        return [self.expression.accumulation(values) for values in self.values(kind)]

    def settle(self) -> None:
        """Ends the last step, and the round that it closes. All ranks of the clan call it, between two steps.

        Most loops need not call it: a step ends inside its last call. In a loop that moves schedules of its own, which
        were not given to ``attach()``, it ends when the loop goes on.
        """
        self.backend.settle()

    def evaluate(
        self, dataset: Dataset, *, num_samples: int | None = None, collate_fn: Callable | None = None
    ) -> list[float]:
        """Mean loss of each member's present weights on a dataset of your own; all ranks of the clan call it.

        Selection never sees it: give it a test split. After :meth:`finish` it measures the averaged weights if the
        champion was saved with its averaged weights.
        """
        self.backend.settle()
        asked = num_samples or len(dataset)  # type: ignore[arg-type]  # torch's Dataset declares no length
        window = make_window(self.backend, self.config.fitness, dataset, num_samples=asked, collate_fn=collate_fn)
        is_averaged = self._summary is not None and self._summary.averaged
        with self.measurement.weights(averaged=is_averaged):
            losses: list[float] = self.measurement.on(window).mean.tolist()
        # On the line all members have one state.
        return losses * (self.config.population_size // len(losses))

    def learning_rate(self, step: int) -> float:
        """This member's first learning rate with what it expresses now and the user's schedule as it is now."""
        return self.expression.learning_rate(self.strategy.lr_factor(step))

    def finish(self, *, status: str = "FINISHED") -> Summary:
        """Ends the run: chooses the champion, writes the results, closes tracking, frees the engine.

        All ranks of the clan call it, once; a second call returns the first one's summary. The engine goes on as
        a plain engine inside the member.
        """
        if self._summary is None:
            self.backend.settle()
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
        self.backend.settle()
        was_aborted = self.members.abort_phase()
        name = self.rounds.commit(begun=not was_aborted)
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
        self.backend.settle()
        return champion.save(self._measured_run(), folder)

    def _measured_run(self) -> champion.MeasuredRun:
        self.transfers.require_consistent()
        return champion.MeasuredRun(self.view, self.progress, self.measurement, self.recorder.run_dir)

    def abandon(self) -> None:
        """Ends the run without results, after an error in the loop; the engine goes on as a plain one."""
        self.recorder.tracking.close(FAILED)
        self.rounds.release()
        self.detach()

    def detach(self) -> None:
        """Takes every hook off the engine and restores what expression changed between steps."""
        if self._unwatch is not None:
            self._unwatch()
            self._unwatch = None
        self.backend.detach()
        self.expression.restore()
