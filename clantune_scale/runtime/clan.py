"""The clan on one rank: hooks on a member's engine that turn its steps into rounds.

Every rank of every member runs this. Ranks meet at a round's end alone: they gather the losses, decide alike
(a decision is a pure function of what was gathered), copy state down their columns, and go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from clantune_scale.checkpoint.durable import DurableRounds
from clantune_scale.config.batch import BatchPlan
from clantune_scale.config.default_genes import genes_for
from clantune_scale.config.schema import ClanConfig
from clantune_scale.core.consensus import values_in_effect
from clantune_scale.core.genome import Genome
from clantune_scale.core.rounds import PhaseKind, RoundClock, RoundPlan, expected_steps, sees_samples_once
from clantune_scale.core.strategies import build
from clantune_scale.data.loaders import make_loader, make_sampler, make_window
from clantune_scale.data.sampler import ClanBatchSampler, ClanDataLoader
from clantune_scale.data.watch import BatchWatch, LossMeter, Stopwatch
from clantune_scale.distributed.self_check import check_parameters, check_world
from clantune_scale.distributed.world import ClanGroups, ClanWorld
from clantune_scale.gradients.nonfinite_mask import NonfiniteMask
from clantune_scale.gradients.probe import GradientProbe
from clantune_scale.results import champion
from clantune_scale.runtime.decisions import agree_on_loss_scale, decide
from clantune_scale.runtime.diagnostics import gather_diagnostics
from clantune_scale.runtime.engine_protocol import Backend
from clantune_scale.runtime.genome_application import Expression, Setter, bind_genes
from clantune_scale.runtime.measurement import Measurement
from clantune_scale.runtime.phases import PhaseManager
from clantune_scale.runtime.recorder import Recorder, Summary
from clantune_scale.runtime.validation_window import Evaluate, ValidationWindow
from clantune_scale.transfer import MemberState, Snapshot, Transfers


class Clan:
    """A member's place in the clan, attached to its engine.

    Args:
        world: from :func:`clantune_scale.join`.
        backend: the member's engine.
        config: the ``clantune`` block.
        batch: how the clan's batch is divided.
        window: the validation window that selection sees.
        evaluate: ``(engine, batch) -> loss`` in place of the model's own loss, or None.
        setters: by target, for genes that the user registers.
        total_steps: optimizer steps of the whole run, or None.
        num_samples: of the training data, or None.

    Attributes:
        population: the genomes in effect and the strategy's memory.
        measurement: losses of all members on common examples, and the averages of weights.
        fitness: of the last evaluation.
        aside: the state at the start of a phase that is not kept, while it runs.
        kept: the state that the guard goes back to.
        losses: what training says of itself.
        expression: of the genome in this member's engine.
        samplers: this rank's, in the order in which they were made.
        rounds: what is written to disk, and what was read from it.
    """

    def __init__(
        self,
        *,
        world: ClanWorld,
        backend: Backend,
        config: ClanConfig,
        batch: BatchPlan,
        window: ValidationWindow,
        evaluate: Evaluate | None = None,
        setters: Mapping[str, Setter] | None = None,
        total_steps: int | None = None,
        num_samples: int | None = None,
    ) -> None:
        self.world, self.backend, self.config, self.batch = world, backend, config, batch
        world.arrange(
            pp=backend.pp_size, tp=backend.tp_size, stands=(backend.pp_rank, backend.dp_rank, backend.tp_rank)
        )
        check_world(world, backend.device)
        check_parameters(world, backend)
        champion.check_forms(self)
        is_once = sees_samples_once(
            num_samples,
            # Of those that were launched: what the genes are must not change when members die.
            batch_size=batch.member_batch * world.launched,
            num_steps=expected_steps(total_steps, config.round_length),
        )
        genes = genes_for(config, backend, sees_samples_once=is_once)
        self.genes = bind_genes(genes, backend, setters or {}, quiet=genes.keys() - config.genes.keys())
        facts = config.facts(self.genes, total_steps=total_steps, sees_samples_once=is_once)
        self.strategy = build(config.strategy.name, facts, config.strategy.options)
        self.phases = PhaseManager(RoundClock(self.strategy.plan), backend.num_steps)
        self.groups = ClanGroups(world, backend.device.type)
        # Where losses are scaled, a gradient that is not finite is the scaler's business, and ordinary.
        if config.faults.nonfinite_mask and backend.loss_scale() is None:
            self.groups.mask = NonfiniteMask(world.member, config.population_size, self.groups.gradient)
        self.transfers = Transfers.of(world, self.groups, config.transfer, runs=Path(config.tracking.directory))
        self.expression = Expression(self.genes, backend, setters or {})
        self.phase_snapshot: Snapshot | None = None
        self.rollback_snapshot: Snapshot | None = None
        self._loader: ClanDataLoader | None = None
        self._summary: Summary | None = None
        self._has_new_plans = False
        self.losses, self._batches, self._clock = LossMeter(), BatchWatch(world.replica_group), Stopwatch()
        self._probe = GradientProbe()
        self.samplers: list[ClanBatchSampler] = []
        self.rounds = DurableRounds(self)
        self.recorder = Recorder(self)
        world.follow(self.rounds.run_dir, self.recorder.tracking.suspend)
        self._hook()
        self.measurement = Measurement(self, window, evaluate)
        self._start()

    @property
    def member(self) -> int:
        """The index of this rank's member."""
        return self.world.member

    @property
    def genome(self) -> Genome:
        """This member's."""
        return self.population.genomes[self.member]

    def _hook(self) -> None:
        """Hooks the engine: gradients, the optimizer's update, the step's end, what is seen."""
        backend = self.backend
        size = self.config.population_size
        backend.share_gradients(lambda: self.phases.team(self.member, size), self.groups, self._probe)
        backend.around_update(lambda: self.expression.during_update(self.lr_factor))
        backend.after_step(self._after_step)
        backend.watch(self._batches.on_batch, self._on_loss)

    def _on_loss(self, loss: Any) -> None:
        self.losses.add(loss)
        if self.groups.mask is not None:
            self.groups.mask.observe(loss)

    def _start(self) -> None:
        """A new run, or one that goes on from a committed round."""
        if self.rounds.events_bytes is None:
            self._start_anew()
            self._begin_phase()
        else:
            begun = self.rounds.restore()
            self.recorder.resume(self)
            self._begin_phase(is_resumed=begun)
        if self.world.membership_change is not None:
            self.recorder.tracking.emit(
                "member_lost", self.phases.position.step, **asdict(self.world.membership_change)
            )
        self.rounds.ready()

    def _start_anew(self) -> None:
        """All members take member 0's state, are measured once, and get their first genomes."""
        self.transfers.run(self.state(), [0] * self.config.population_size)
        if self.measurement.uses_ema is not None:
            self.measurement.uses_ema.restart()
        self.fitness = self.measurement.fitness(averaged=False)
        self.population = self.strategy.init(self.fitness)
        self._regroup(0, None)
        if self.strategy.guards:
            self.rollback_snapshot = Snapshot(self.state())
        self.recorder.start(self)

    @property
    def lr_factor(self) -> float:
        """The final decay's share of all learning rates in the step that comes."""
        return self.strategy.lr_factor(self.phases.position.step)

    def state(self) -> MemberState:
        """This rank's live training state, its averaged weights included.

        Raises:
            TransferError: if it is torn: a transfer into it failed.
        """
        self.transfers.require_consistent()
        state = self.backend.state()
        if self.measurement.uses_ema is not None:
            uses_ema = self.measurement.uses_ema.tensors
            state.tensors += [(f"average.{index}", tensor) for index, tensor in enumerate(uses_ema)]
        return state

    def _after_step(self) -> None:
        done = self.phases.advance()
        if self.groups.mask is not None:
            self.groups.mask.end_step()
        if self.measurement.uses_ema is not None and done.plan.uses_ema:
            self.measurement.uses_ema.update(done.step + 1, done.plan.ema_window_steps)
        self.recorder.step(self, done, self.losses)
        if done.ends_phase:
            self._clock.lap(done.phase.kind.value)
            if done.ends_round:
                self._end_round(done.plan)
            self._begin_phase()
        self._probe.is_active = self.phases.position.ends_phase
        self.rounds.step_done()

    def _end_round(self, plan: RoundPlan) -> None:
        """The meeting point: evaluate, go back where nothing is kept, decide, transfer, record."""
        measured = self.population
        self.fitness = self.measurement.fitness(averaged=plan.uses_ema)
        self._clock.lap("evaluation")
        nonfinite_counts = self.losses.read_nonfinite_counts() + (
            self.groups.mask.read_nonfinite_counts() if self.groups.mask else 0
        )
        diagnostics = gather_diagnostics(
            self, plan, self._probe, nonfinite_counts=nonfinite_counts, losses=self.losses.round_losses
        )
        self.losses.begin_round()
        self.fitness = replace(self.fitness, training_loss=diagnostics.clan_training_loss)
        if self.phase_snapshot is not None:
            self.phase_snapshot.restore(self.state())
            self.phase_snapshot = None
        decision = decide(self, plan)
        if decision.rolls_back and self.rollback_snapshot is not None:
            self.rollback_snapshot.restore(self.state())
        self.transfers.run(self.state(), decision.donors, round_index=plan.index)
        if decision.mixing_weights is not None:
            self.transfers.average(self.state(), decision.mixing_weights, round_index=plan.index)
        if self.strategy.guards and decision.takes_snapshot and not decision.rolls_back:
            self.rollback_snapshot = Snapshot(self.state())
        self.population = decision.population
        self._regroup(plan.index + 1, measured.teams)
        self._clock.lap("transfer")
        self.recorder.round_end(
            self, plan, measured, decision, diagnostics, self._clock.empty(), self._batches.compare()
        )
        self._follow_plans()
        self.rounds.round_ended(plan, decision)

    def _begin_phase(self, *, is_resumed: bool = False) -> None:
        """Expresses what the phase that comes lets members express; a resumed one has begun before."""
        position = self.phases.position
        phase = position.phase
        self._probe.is_active = position.ends_phase
        if is_resumed:
            self.expression.express(self.values(phase.kind)[self.member], batch_factor=phase.batch_factor)
            return
        if position.starts_round and position.plan.uses_ema and not self.phases.averaged_before:
            self.measurement.uses_ema.restart()
        if not phase.keeps and self.phase_snapshot is None:
            self.phase_snapshot = Snapshot(self.state())
        self.expression.express(self.values(phase.kind)[self.member], batch_factor=phase.batch_factor)
        if phase.kind is PhaseKind.COOPERATIVE:
            agree_on_loss_scale(self)
        self._batches.begin(phase)
        self.recorder.phase_start(self, position)

    def values(self, kind: PhaseKind) -> list[dict[str, float]]:
        """What each member expresses in such a phase, by member and gene name."""
        return values_in_effect(self.population.genomes, self.genes, kind)

    def sampler(self, num_samples: int, *, shuffle: bool = True) -> ClanBatchSampler:
        """A batch sampler that follows the phases, for a loader of your own (``DataLoader(batch_sampler=...)``).

        Args:
            num_samples: length of the dataset.
            shuffle: whether each epoch has an order of its own, drawn from the clan's seed.
        """
        return self.rounds.follow(make_sampler(self, num_samples, shuffle=shuffle))

    def loader(self, dataset: Dataset, **options: Any) -> ClanDataLoader:
        """A data loader over ``dataset`` that follows the phases; ``options`` go to torch's ``DataLoader``.

        Raises:
            ConfigError: if the dataset is not map-style: without an index there is no common window.
        """
        self._loader = make_loader(self, dataset, **options)
        return self._loader

    def accumulation(self, kind: PhaseKind) -> list[int]:
        """[members] micro-batches per step in such a phase, as far as it is decided today."""
        return [self.expression.accumulation(values) for values in self.values(kind)]

    def _regroup(self, index: int, before: tuple[int, ...] | None) -> None:
        """From round ``index`` on, the teams are the population's; they were ``before``."""
        if self.population.teams != before:
            self.phases.regroup(index, self.population.teams)
            self._has_new_plans = True

    def _follow_plans(self) -> None:
        """Batches that were prefetched for plans that no longer hold are dropped."""
        moves_batch = any(gene.target == "accumulation" for gene in self.genes)
        if self._loader is not None and (moves_batch or self._has_new_plans):
            self._loader.replan()
        self._has_new_plans = False

    def evaluate(
        self, dataset: Dataset, *, num_samples: int | None = None, collate_fn: Callable | None = None
    ) -> list[float]:
        """Mean loss of each member's present weights on a dataset of your own; all ranks of the clan call it.

        Selection never sees it: give it a test split. Once the run is finished, of the averaged weights if those are
        what was kept of the champion.
        """
        asked = num_samples or len(dataset)
        window = make_window(self.backend, self.config.fitness, dataset, num_samples=asked, collate_fn=collate_fn)
        is_averaged = self._summary is not None and self._summary.averaged
        with self.measurement.averaged_weights() if is_averaged else nullcontext():
            return self.measurement.on(window).mean.tolist()

    def learning_rate(self, step: int) -> float:
        """This member's first learning rate with what it expresses now, the user's schedule where it is now."""
        return self.expression.learning_rate(self.strategy.lr_factor(step))

    def finish(self, *, status: str = "FINISHED") -> Summary:
        """Ends the run: chooses the champion, writes what is to be kept, closes tracking, frees the engine.

        All ranks of the clan call it, once; a second call returns the first one's summary. The engine goes
        on as plain DeepSpeed inside the member.
        """
        if self._summary is None:
            self.rounds.finish()
            summary = champion.write(self, champion.choose(self))
            self.recorder.finish(self, summary, status=status)
            self.rounds.release()
            self.detach()
            # Nobody leaves while another still reads from the store that rank 0 serves.
            self.world.replica_group.gather_json(None)
            self.world.leave()
            self._summary = summary
        return self._summary

    def stop(self) -> str | None:
        """Commits the state as it is, inside a round too, and ends the run as one that was killed and goes on later.

        All ranks of the clan call it between two optimizer steps. The engine goes on as it was without a clan.

        Returns:
            The name of the committed round, or None where it could not be written: the one before stays.
        """
        name = self.rounds.commit()
        self.recorder.stop(self, name)
        self.rounds.release()
        self.detach()
        return name

    def save_champion(self, folder: Path | None = None) -> Path:
        """Writes the weights of the member that was best in the last evaluation, as they are now, and goes on.

        All ranks of the clan call it, between two optimizer steps.

        Args:
            folder: where to; ``champion-step-NNNNNNNN`` in the run's folder where None.

        Returns:
            The folder, with the forms that ``checkpoint.champion`` lists (safetensors where it lists none).

        Raises:
            ClanError: if no member had a finite loss, or the weights could not be written.
        """
        return champion.save(self, folder)

    def detach(self) -> None:
        """Takes every hook off the engine and puts back what expression changed between steps."""
        self.backend.detach()
        self.expression.restore()
