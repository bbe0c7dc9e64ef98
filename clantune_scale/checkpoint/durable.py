"""What the clan sees of its rounds on disk: open a run, write as it goes, stop."""

from __future__ import annotations

import atexit
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from clantune_scale.checkpoint import fit, manifest
from clantune_scale.checkpoint.all_ranks import Everyone
from clantune_scale.checkpoint.capture import Capture
from clantune_scale.checkpoint.lock import RunLock
from clantune_scale.checkpoint.opening import open_run, set_aside
from clantune_scale.checkpoint.preemption import Preemption
from clantune_scale.checkpoint.restore import check_parameters, fault_of, restore_clan, sources_of
from clantune_scale.checkpoint.streams import RandomStreams
from clantune_scale.checkpoint.writer import RoundWriter
from clantune_scale.core.rounds import RoundPlan
from clantune_scale.core.strategies import Decision
from clantune_scale.data.sampler import ClanBatchSampler
from clantune_scale.errors import CheckpointError

if TYPE_CHECKING:
    from clantune_scale.runtime.clan import Clan


class DurableRounds:
    """One clan's rounds on disk. All ranks of the clan call each method alike.

    Args:
        clan: whose they are; its world, backend, strategy and groups are there.

    Attributes:
        opening: the run's folder, and the round that it is continued from.

    Raises:
        CheckpointError: if a run is to be continued and cannot be, or another process works on it.
    """

    def __init__(self, clan: Clan) -> None:
        self._clan, self._settings = clan, clan.config.checkpoint
        self._everyone = Everyone(clan.world, clan.groups)
        self._lock: RunLock | None = None
        self.opening = open_run(clan.config, self._everyone, take=self._take, fault=self._fault)
        self._facts = {"settings": fit.settings_of(clan), "topology": asdict(clan.world.topology)}
        if self.opening.content is not None:
            fit.check_settings(self.opening.content["settings"], self._facts["settings"], self._settings.allow)
            self._check_parameters(self._sources(self.opening.content))
            if self._everyone.is_leader:
                set_aside(self._folder, self.opening.name)
        self._made: RoundWriter | None = None
        self._places: list[dict[str, int]] = []
        self._streams: RandomStreams | None = None
        self._has_told = False
        self._preemption = Preemption(self._everyone, self._settings) if self._settings.every_rounds else None

    @property
    def run_dir(self) -> Path:
        """The run's folder, on every rank."""
        return self.opening.run_dir

    @property
    def events_bytes(self) -> int | None:
        """Length of the events file when the round was captured that this run goes on from; None for a new run."""
        return None if self.opening.content is None else self.opening.content["events_bytes"]

    @property
    def sources(self) -> list[int] | None:
        """By member, the member that it continues, where there is another number of them now."""
        content = self.opening.content
        if content is None or len(content["holders"]) == self._clan.config.population_size:
            return None
        return list(self._sources(content))

    def restore(self) -> bool:
        """Puts the round into the clan; whether its phase had begun. Random streams follow with :meth:`ready`."""
        assert self.opening.content is not None
        numbers = restore_clan(self._clan, self.opening.folder, self._sources(self.opening.content))
        self._places = list(numbers["samplers"])
        # A member that was added goes on with the streams that it was started with: its source's would give it the
        # same dropout in every step.
        is_added = self._clan.member >= len(self.opening.content["holders"])
        self._streams = None if is_added else numbers["streams"]
        return numbers["begun"]

    def ready_data(self) -> None:
        """Streams go on where they were, whatever has been drawn since the launch; after a step there is no going."""
        if self._streams is not None:
            self._streams.restore(self._clan.backend)

    def ready(self) -> None:
        """The clan stands. A loader asks for the streams again: the user's own set-up may draw from them."""
        self.ready_data()
        if self._preemption is not None:
            self._preemption.start(self._clan.phases.position.step)

    def follow(self, sampler: ClanBatchSampler) -> ClanBatchSampler:
        """Keeps a sampler's place with each round; one of a resumed run goes to where its predecessor was.

        Samplers are told apart by the order in which they are made.
        """
        self._clan.samplers.append(sampler)
        if self._places:
            sampler.load_state_dict(self._places.pop(0))
        elif self.opening.content is not None:
            sampler.load_state_dict({"step": self._clan.phases.position.step})
        return sampler

    def round_ended(self, plan: RoundPlan, decision: Decision) -> None:
        """The meeting point is over: commits what is written, and starts on this round where it is due."""
        every = self._settings.every_rounds
        if every is None or not self._writer.settle(wait=False):
            self._tell_of_slowness(plan)
            return
        if (plan.index + 1) % every == 0:
            is_alone = decision.mixing_weights is None and all(m == d for m, d in enumerate(decision.donors))
            is_kept = is_alone if decision.rolls_back else decision.takes_snapshot
            capture = Capture.take(self._clan, begun=False, rollback_is_live=is_kept)
            self._write(manifest.round_name(plan.index), capture, decision.donors, wait=not self._settings.asynchronous)

    def step_done(self) -> None:
        """An optimizer step is done, and the next phase has begun where one did: a signal may end the run here.

        About once a second, when ranks compare whether one came, what is written by then is committed.

        Raises:
            SystemExit: with status 143, once the state is committed, where SIGTERM came.
        """
        self._streams = None
        step = self._clan.phases.position.step
        if self._preemption is None or not self._preemption.meets(step):
            return
        if self._preemption.is_due(step):
            self._clan.stop()
            self._preemption.leave()
        if self._made is not None:
            self._made.settle(wait=False)

    def commit(self) -> str | None:
        """Commits the state as it is, inside a round too, and waits for it; the name, or None where it failed."""
        step = self._clan.phases.position.step
        self._writer.settle(wait=True)
        if self._everyone.from_leader(self._writer.last_step) != step:
            name = manifest.round_name(self._clan.phases.position.plan.index, step)
            members = range(self._clan.config.population_size)
            self._write(name, Capture.take(self._clan, begun=True, rollback_is_live=False), members, wait=True)
        names = manifest.committed(self._folder)
        return self._everyone.from_leader(names[0] if self._writer.last_step == step else None)

    def finish(self) -> None:
        """Waits for the round that is being written."""
        if self._made is not None:
            self._made.settle(wait=True)

    def release(self) -> None:
        """Leaves the folder to others, and signals to who handled them before."""
        if self._preemption is not None:
            self._preemption.release()
        if self._lock is not None:
            self._lock.release()
            atexit.unregister(self._lock.release)

    @property
    def _folder(self) -> Path:
        return self.run_dir / manifest.FOLDER

    @property
    def _writer(self) -> RoundWriter:
        """Made when first asked for: all ranks of a member ask alike."""
        if self._made is None:
            self._made = RoundWriter(
                self._folder,
                self._everyone,
                self._clan.world.at,
                # The thread that writes talks over it while training talks over the engine's own.
                dist.new_group(backend="gloo", timeout=timedelta(seconds=self._clan.world.timeout_s)),
                keep_last=self._settings.keep_last,
                say=self._warn,
            )
        return self._made

    def _write(self, name: str, capture: Capture, holders: Sequence[int], *, wait: bool) -> None:
        clan = self._clan
        content = {
            **self._facts,
            "run_id": self.run_dir.name,
            "round": clan.phases.position.plan.index,
            "step": clan.phases.position.step,
            "begun": capture.clan["begun"],
            "time_s": time.time(),
            "losses": clan.fitness.mean.tolist(),
            "events_bytes": clan.recorder.tracking.num_bytes,
            "clan": capture.clan,
        }
        if self._writer.begin(name, capture, holders, content, wait=wait) and wait:
            self._writer.settle(wait=True)

    def _check_parameters(self, sources: Sequence[int]) -> None:
        """On all ranks alike: stages of a pipeline have other parameters each."""
        problem = None
        try:
            check_parameters(self._clan, self.opening.folder, sources)
        except CheckpointError as error:
            problem = str(error)
        problems = [said for said in self._everyone.gather(problem) if said is not None]
        if problems:
            raise CheckpointError(problems[0])

    def _warn(self, message: str) -> None:
        self._clan.recorder.tracking.emit("warning", self._clan.phases.position.step, message=message)

    def _tell_of_slowness(self, plan: RoundPlan) -> None:
        if self._settings.every_rounds is not None and not self._has_told:
            self._has_told = True
            self._warn(
                f"round {plan.index} is not written down, because the one before is still being written. A round is "
                f"written as often as the file system of {self._folder} can; this is said once."
            )

    def _take(self, run_dir: Path) -> None:
        supervisor = self._clan.world.supervisor
        self._lock = RunLock(
            run_dir,
            generation=None if supervisor is None else (supervisor.generation.launch_id, supervisor.generation.number),
        )
        atexit.register(self._lock.release)

    def _fault(self, folder: Path, content: dict[str, Any]) -> str | None:
        return fault_of(folder, content, self._clan.world.at, self._sources(content), self._clan.world.topology)

    def _sources(self, content: dict[str, Any]) -> Sequence[int]:
        return sources_of(content, self._clan.config.population_size)
