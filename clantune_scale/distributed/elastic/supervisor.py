"""What the clan knows of members that die: the one object that starts a process again, or lets it end."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from torch.distributed import Store

from clantune_scale.checkpoint import manifest
from clantune_scale.distributed.bootstrap import Address
from clantune_scale.distributed.elastic.failures import one_line, peer_failure
from clantune_scale.distributed.elastic.generation import Generation
from clantune_scale.distributed.elastic.heartbeat import Heartbeat
from clantune_scale.distributed.elastic.quorum import resume_remedy, within
from clantune_scale.distributed.elastic.restart import restart_process

if TYPE_CHECKING:
    from clantune_scale.config.schema import FaultsConfig

RESUME = "CLANTUNE_RESUME"
#: Epochs in a row that lost nobody and came to no further round: what fails then would fail again.
_MOST_IDLE = 3
_FLUSH_S = 15.0


class Supervisor:
    """Stands between a failed collective and the end of the process.

    It does nothing where ``faults.min_members`` is null, but say how the run goes on.

    Args:
        settings: the block's ``faults`` part.
        epoch: that this process is in.
        members: that were launched, or were in the epoch before; :meth:`set_members` tells who is in this one.
        name: what this process calls itself in messages.
        environ: the environment of the next start.

    Attributes:
        settings, epoch: as given.
        run_dir: the run's folder, when it is known.
        before_restart: what is to be done before this process starts again, such as sending what is queued.
    """

    def __init__(
        self,
        settings: FaultsConfig,
        generation: Generation,
        *,
        members: tuple[int, ...],
        name: str = "",
        environ: MutableMapping[str, str] = os.environ,
    ) -> None:
        self.settings, self.generation, self._environ = settings, generation, environ
        self._members, self._addresses, self._name = members, generation.addresses, name
        self.run_dir: Path | None = None if generation.run_dir is None else Path(generation.run_dir)
        self.before_restart: list[Callable[[], None]] = []
        self._is_armed = settings.min_members is not None
        self._has_failed = False
        self._lock = threading.Lock()
        self._heartbeat: Heartbeat | None = None
        self._store: Store | None = None
        self._size = 1
        self._previous, self._second = sys.excepthook, sys.excepthook
        sys.excepthook = self._on_exception

    def watch(self, store: Store, *, rank: int, size: int, name: Callable[[int], str]) -> None:
        """Begins to watch the others, where members may die."""
        if self._is_armed and size > 1:
            # Torch's watchdog would end the process when a collective of NCCL's takes too long: it is to end the
            # collective alone, whose error then comes here.
            self._environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
            self._store, self._size = store, size
            self._heartbeat = Heartbeat(
                store.clone(),
                rank=rank,
                size=size,
                name=name,
                silence_s=self.settings.deadline_s,
                on_failure=self._on_failure,
            )

    def set_members(self, members: tuple[int, ...]) -> None:
        """The epoch has begun, with these members."""
        self._members = members

    def set_addresses(self, addresses: tuple[Address, ...]) -> None:
        """The members have stores, and these are their addresses."""
        self._addresses = addresses

    @contextmanager
    def within(self, seconds: float, what: str) -> Iterator[None]:
        """Inside, this process starts again when it takes longer: calls on a frozen host's store do not return."""
        timer = threading.Timer(seconds, self._on_failure, [f"{what} took more than {seconds:g} s"])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def precede_other_hooks(self) -> None:
        """Looks at an error before the hooks do that were set since: they would end the run."""
        self._second = sys.excepthook
        sys.excepthook = self._before_others

    def withdraw(self) -> None:
        """From now on a failure ends this process: it is about to end anyway."""
        self._is_armed = False

    def leave(self) -> None:
        """The run is over for this rank: waits, not for ever, until it is for all, because one serves the store."""
        self._is_armed = False
        if self._heartbeat is None:
            return
        if not self._has_failed:
            within(self.settings.deadline_s, self._wait_for_all)
        self._heartbeat.stop()
        self._heartbeat = None

    def _wait_for_all(self) -> None:
        assert self._store is not None
        if self._store.add("done", 1) == self._size:
            self._store.set("done/all", "")
        self._store.wait(["done/all"])

    def _before_others(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        failure = peer_failure(error)
        if self._is_armed and failure is not None:
            self._restart(one_line(failure))
        self._second(kind, error, trace)

    def _on_exception(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        failure = peer_failure(error)
        if failure is not None:
            if self._is_armed:
                self._restart(one_line(failure))
            if self.settings.min_members is None:
                print(f"clan: a member is lost. {resume_remedy(self._resumable())}", file=sys.stderr, flush=True)
        # What ends this process is its own affair, and its member's.
        self._is_armed, self._has_failed = False, True
        self._previous(kind, error, trace)

    def _on_failure(self, reason: str) -> None:
        """On a thread: nobody is there to whom an error could go."""
        if not self._is_armed:
            return
        try:
            self._restart(reason)
        except Exception:
            traceback.print_exc()
            os._exit(1)

    def _restart(self, reason: str) -> None:
        """Starts this process again; a second thread that comes here waits for the end."""
        self._lock.acquire()
        # The first to see a failure has the best reason: what the others see is its leaving.
        reason = f"{self._name}: {reason}"
        if self._heartbeat is not None:
            heartbeat, own = self._heartbeat, reason
            reason = within(2.0, lambda: heartbeat.tell(own)) or own
        following = self._following(reason)
        for action in self.before_restart:
            within(_FLUSH_S, action)
        if following.num_idle > _MOST_IDLE:
            print(
                f"clan: {following.num_idle} epochs in a row began with all members and failed before a further round "
                f"was committed: no member's death is the reason. It is: {reason}. {resume_remedy(self._resumable())}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)
        print(
            f"clan: {self._name} leaves generation {self.generation.number} for generation {following.number}: "
            f"{reason}",
            file=sys.stderr,
            flush=True,
        )
        following.write(self._environ)
        restart_process(self._environ)

    def _following(self, reason: str) -> Generation:
        """The epoch after this one, with what it goes on from in the environment."""
        run_dir = self._resumable()
        newest = None
        if run_dir is not None:
            self._environ[RESUME] = run_dir
            newest = manifest.committed(Path(run_dir) / manifest.FOLDER)[0]
        else:
            self._environ.pop(RESUME, None)
        has_all = self._members == self.generation.members
        is_idle = self.generation.number > 0 and has_all and newest == self.generation.newest
        return replace(
            self.generation,
            number=self.generation.number + 1,
            members=self._members,
            addresses=self._addresses,
            run_dir=run_dir,
            failure=reason,
            failed_at=time.time(),
            num_idle=self.generation.num_idle + 1 if is_idle else 0,
            newest=newest,
        )

    def _resumable(self) -> str | None:
        """The run's folder, if there is a committed round in it."""
        if self.run_dir is None or not manifest.committed(self.run_dir / manifest.FOLDER):
            return None
        return str(self.run_dir)
