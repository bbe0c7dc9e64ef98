"""A clan's rounds on disk: opens a run, writes rounds while it goes on, stops it."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from clantune_scale.checkpoint import fit
from clantune_scale.checkpoint.all_ranks import Everyone
from clantune_scale.checkpoint.capture import Capture
from clantune_scale.checkpoint.lock import RunLock
from clantune_scale.checkpoint.opening import Opening, open_run, set_aside
from clantune_scale.checkpoint.preemption import Preemption
from clantune_scale.checkpoint.restore import Target, check_parameters, fault_of, restore_clan, sources_of
from clantune_scale.checkpoint.run_state import RunProgress, RunView
from clantune_scale.checkpoint.streams import RandomStreams
from clantune_scale.checkpoint.writer import RoundWriter
from clantune_scale.core.rounds import RoundPlan
from clantune_scale.core.strategies import Decision
from clantune_scale.data.sampler import ClanBatchSampler
from clantune_scale.errors import CheckpointError
from clantune_scale.tracking.run_dir import ROUNDS, committed_rounds, round_name
from clantune_scale.transfer import MemberState


class EventLog(Protocol):
    """The run's events, as far as rounds on disk use them.

    Attributes:
        events_bytes: length of the events file now.
    """

    @property
    def events_bytes(self) -> int: ...

    def warn(self, message: str) -> None:
        """Records a warning."""


class DurableRounds:
    """One clan's rounds on disk. All ranks of the clan call each method alike, :meth:`open` first.

    Args:
        view: the clan on this rank.
        progress: of the run.
        state: gives this rank's live training state.
        prepare: makes what the state holds inside a round, before it is loaded; told whether the round had begun.
        stop: ends the run with a commit; called after SIGTERM.
        log: the run's events.

    Attributes:
        opening: the run's folder, and the round that is continued.
    """

    opening: Opening

    def __init__(
        self,
        view: RunView,
        progress: RunProgress,
        *,
        state: Callable[[], MemberState],
        prepare: Callable[[bool], None],
        stop: Callable[[], object],
        log: EventLog,
    ) -> None:
        self._view, self._progress, self._settings = view, progress, view.config.checkpoint
        self._state, self._prepare, self._stop, self._log = state, prepare, stop, log
        self._num_calls = 0
        self._everyone = Everyone(view.world, view.groups)
        self._facts = {"settings": fit.settings_of(view), "topology": asdict(view.world.topology)}
        self._lock: RunLock | None = None
        self._made: RoundWriter | None = None
        self._places: list[dict[str, int]] = []
        self._streams: RandomStreams | None = None
        self._has_told = False
        self._preemption = Preemption(self._everyone, self._settings) if self._settings.every_rounds else None

    def open(self) -> Opening:
        """Makes the folder of a new run, or opens the run that is continued.

        Raises:
            CheckpointError: if a run is to be continued and cannot be, or another process works on it.
        """
        self.opening = open_run(self._view.config, self._everyone, take=self._take, fault=self._fault)
        if self.opening.content is not None:
            fit.check_settings(self.opening.content["settings"], self._facts["settings"], self._settings.allow)
            self._check_parameters()
            if self._everyone.is_leader:
                set_aside(self._folder, self.opening.name)
        return self.opening

    @property
    def run_dir(self) -> Path:
        """The run's folder, on every rank."""
        return self.opening.run_dir

    @property
    def sources(self) -> list[int] | None:
        """By member, the member that it continues; None unless the number of members has changed."""
        content = self.opening.content
        if content is None or len(content["losses"]) == self._view.config.population_size:
            return None
        return list(self._sources(content))

    def restore(self) -> bool:
        """Loads the round into the clan; returns whether its phase had begun.

        :meth:`ready` restores the random streams.
        """
        assert self.opening.content is not None
        target = Target(self._view, self._progress, self._state, self._prepare)
        numbers = restore_clan(target, self.opening.folder, self._sources(self.opening.content))
        self._places = list(numbers["samplers"])
        # An added member keeps the random streams of this launch: with its source's streams, its
        # dropout would remove the same activations as its source's in every step.
        is_added = self._view.member >= len(self.opening.content["holders"])
        self._streams = None if is_added else numbers["streams"]
        return numbers["begun"]

    def ready_data(self) -> None:
        """Restores the round's random streams; does nothing once the first step is done."""
        if self._streams is not None:
            self._streams.restore(self._view.backend)

    def ready(self) -> None:
        """Restores the random streams and handles SIGTERM, once the clan has started.

        A loader restores the streams again: the user's own set-up may draw from them.
        """
        self.ready_data()
        if self._preemption is not None:
            self._preemption.start(self._num_calls)

    def follow(self, sampler: ClanBatchSampler) -> ClanBatchSampler:
        """Saves a sampler's position with each round; in a resumed run it continues where its predecessor was.

        Samplers are identified by the order in which they are made.
        """
        self._progress.samplers.append(sampler)
        if self._places:
            sampler.load_state_dict(self._places.pop(0))
        elif self.opening.content is not None:
            sampler.load_state_dict({"step": self._view.phases.position.step})
        return sampler

    def round_ended(self, plan: RoundPlan, decision: Decision) -> None:
        """Commits an earlier round if it is written, and starts to write the round that just ended if it is due."""
        every = self._settings.every_rounds
        if every is None or not self._writer.settle(wait=False):
            self._tell_of_slowness(plan)
            return
        if (plan.index + 1) % every == 0:
            is_unmoved = decision.mixing_weights is None and all(m == d for m, d in enumerate(decision.donors))
            is_unmoved = is_unmoved or self._view.has_one_state
            is_snapshot = is_unmoved if decision.rolls_back else decision.takes_snapshot
            capture = self._capture(begun=False, rollback_is_live=is_snapshot)
            holders = [0] if self._view.has_one_state else decision.donors
            self._write(round_name(plan.index), capture, holders, wait=not self._settings.asynchronous)

    def step_done(self) -> None:
        """Call it after each optimizer step, and after the start of the next phase. SIGTERM may end the run here.

        About once a second, ranks compare whether a signal came, and commit a round whose files are written.

        Raises:
            SystemExit: with status 143 after SIGTERM, once the state is committed.
        """
        self._streams = None
        # Steps of this launch, and not of the run: turns take steps that the run does not count.
        self._num_calls += 1
        if self._preemption is None or not self._preemption.meets(self._num_calls):
            return
        if self._preemption.is_due(self._num_calls):
            self._stop()
            self._preemption.leave()
        if self._made is not None:
            self._made.settle(wait=False)

    def commit(self, *, begun: bool = True) -> str | None:
        """Commits the present state, also inside a round, and waits; returns the round's name, or None on failure.

        Args:
            begun: whether the present phase has begun; false if it was put back to its start.
        """
        step = self._view.phases.position.step
        self._writer.settle(wait=True)
        if self._everyone.from_leader(self._writer.last_step) != step:
            name = round_name(self._view.phases.position.plan.index, step)
            members = range(self._view.world.topology.population_size)
            self._write(name, self._capture(begun=begun, rollback_is_live=False), members, wait=True)
        names = committed_rounds(self._folder)
        return self._everyone.from_leader(names[0] if self._writer.last_step == step else None)

    def finish(self) -> None:
        """Waits for the round that is being written."""
        if self._made is not None:
            self._made.settle(wait=True)

    def release(self) -> None:
        """Gives up the folder's lock and the signal handler."""
        if self._preemption is not None:
            self._preemption.release()
        if self._lock is not None:
            self._lock.release()
            atexit.unregister(self._lock.release)

    @property
    def _folder(self) -> Path:
        return self.run_dir / ROUNDS

    @property
    def _writer(self) -> RoundWriter:
        """Made when first used; all ranks of a member use it alike, since making its group is a collective."""
        if self._made is None:
            self._made = RoundWriter(
                self._folder,
                self._everyone,
                self._view.world.at,
                self._writing_group(),
                keep_last=self._settings.keep_last,
                say=self._log.warn,
            )
        return self._made

    def _writing_group(self) -> Any:
        """Only the writing thread uses this group; training uses the engine's at the same time. None for one rank."""
        if not dist.is_initialized():
            return None
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=self._view.world.timeout_s))

    def _write(self, name: str, capture: Capture, holders: Sequence[int], *, wait: bool) -> None:
        content = {
            **self._facts,
            "run_id": self.run_dir.name,
            "round": self._view.phases.position.plan.index,
            "step": self._view.phases.position.step,
            "begun": capture.clan["begun"],
            "time_s": time.time(),
            "losses": self._progress.fitness.mean.tolist(),
            "events_bytes": self._log.events_bytes,
            "clan": capture.clan,
        }
        if self._writer.begin(name, capture, holders, content, wait=wait) and wait:
            self._writer.settle(wait=True)

    def _check_parameters(self) -> None:
        """Raises one rank's error on all ranks: each stage of a pipeline has its own parameters."""
        assert self.opening.content is not None
        problem = None
        try:
            check_parameters(self._view, self.opening.folder, self._state_sources(self.opening.content))
        except CheckpointError as error:
            problem = str(error)
        problems = [said for said in self._everyone.gather(problem) if said is not None]
        if problems:
            raise CheckpointError(problems[0])

    def _capture(self, *, begun: bool, rollback_is_live: bool) -> Capture:
        return Capture.take(self._view, self._progress, self._state(), begun=begun, rollback_is_live=rollback_is_live)

    def _tell_of_slowness(self, plan: RoundPlan) -> None:
        if self._settings.every_rounds is not None and not self._has_told:
            self._has_told = True
            self._log.warn(
                f"round {plan.index} is not saved, because an earlier one is still being written. Rounds are saved as "
                f"often as the file system of {self._folder} allows; raise clantune.checkpoint.every_rounds to save "
                f"fewer. This is reported once."
            )

    def _take(self, run_dir: Path) -> None:
        supervisor = self._view.world.supervisor
        self._lock = RunLock(
            run_dir,
            generation=None if supervisor is None else (supervisor.generation.launch_id, supervisor.generation.number),
        )
        atexit.register(self._lock.release)

    def _fault(self, folder: Path, content: dict[str, Any]) -> str | None:
        return fault_of(folder, content, self._view.world.at, self._state_sources(content), self._view.world.topology)

    def _sources(self, content: dict[str, Any]) -> Sequence[int]:
        return sources_of(content, self._view.config.population_size)

    def _state_sources(self, content: dict[str, Any]) -> Sequence[int]:
        """By member of the world, the saved member whose files it reads."""
        return [0] if self._view.has_one_state else self._sources(content)
