"""The supervisor of one process: after a failure elsewhere it restarts the process, or lets it end."""

from __future__ import annotations

import logging
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

from clantune_scale.distributed.bootstrap import Address
from clantune_scale.distributed.elastic.failures import one_line, peer_failure
from clantune_scale.distributed.elastic.generation import Generation
from clantune_scale.distributed.elastic.heartbeat import Heartbeat
from clantune_scale.distributed.elastic.last_words import LastWords
from clantune_scale.distributed.elastic.quorum import resume_remedy, within
from clantune_scale.distributed.elastic.restart import restart_process
from clantune_scale.distributed.store import own_connection
from clantune_scale.tracking.run_dir import ROUNDS, committed_rounds

if TYPE_CHECKING:
    from clantune_scale.config.schema import FaultsConfig

logger = logging.getLogger(__name__)

RESUME = "CLANTUNE_RESUME"
#: Consecutive generations that lost no member and committed no round. The same failure would come again.
_MOST_IDLE = 3
_FLUSH_S = 15.0


class Supervisor:
    """Restarts this process when another one fails.

    If ``faults.min_members`` is null, it only prints how to resume the run.

    Args:
        settings: the block's ``faults`` section.
        generation: the one that this process is in.
        members: that were launched, or were in the generation before. :meth:`set_members` names the present ones.
        name: of this process in messages.
        environ: the environment of the restarted process.

    Attributes:
        settings, generation: as given.
        run_dir: the run's folder; None until it is known.
        before_restart: is called before this process restarts, for example to send queued events.
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
        self._last_words: LastWords | None = None
        self._previous, self._second = sys.excepthook, sys.excepthook
        sys.excepthook = self._on_exception

    def watch(self, store: Store, *, rank: int, size: int, name: Callable[[int], str]) -> None:
        """Starts to watch the other ranks, if members may die.

        Args:
            store: the clan's.
            rank, size: this rank and the number of ranks.
            name: maps a rank's number to its name in messages.
        """
        if size > 1:
            self._last_words = LastWords(store, rank=rank, size=size, name=name)
        if self._is_armed and size > 1:
            # By default torch's watchdog ends the process when an NCCL collective times out. With 2 it ends only the
            # collective, and the error reaches the exception hook.
            self._environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
            self._store, self._size = store, size
            self._heartbeat = Heartbeat(
                own_connection(store),
                rank=rank,
                size=size,
                name=name,
                silence_s=self.settings.deadline_s,
                on_failure=self._on_failure,
            )

    def set_members(self, members: tuple[int, ...]) -> None:
        """Names the members of this generation, by the numbers that they were launched with."""
        self._members = members

    def set_addresses(self, addresses: tuple[Address, ...]) -> None:
        """Names the addresses of the members' stores, at which survivors look for the next generation's store."""
        self._addresses = addresses

    @contextmanager
    def within(self, seconds: float, what: str) -> Iterator[None]:
        """Restarts this process if the body takes longer. A call on the store of a frozen host does not return."""
        timer = threading.Timer(seconds, self._on_failure, [f"{what} took more than {seconds:g} s"])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def precede_other_hooks(self) -> None:
        """Handles an error before exception hooks that were set later. They would end the run first."""
        self._second = sys.excepthook
        sys.excepthook = self._before_others

    def withdraw(self) -> None:
        """Stops handling failures: the next one ends this process."""
        self._is_armed = False

    def leave(self) -> None:
        """Ends the run on this rank. It waits until all ranks have ended, because one of them serves the store."""
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
        if failure is not None and self._is_armed:
            self._restart(one_line(failure))
        # This process ends by its own error. The others see that it is gone.
        self._is_armed, self._has_failed = False, True
        if failure is None and self._last_words is not None:
            self._last_words.say(one_line(error))
        self._previous(kind, error, trace)
        if failure is not None and self.settings.min_members is None:
            # After the traceback: of a peer's failure it says no more than that a connection was closed.
            cause = self._last_words.of_others() if self._last_words is not None else ""
            logger.error("clan: a member is lost%s. %s", cause, resume_remedy(self._resumable()))

    def _on_failure(self, reason: str) -> None:
        """Restarts this process from a background thread, where nothing else would handle an error."""
        if not self._is_armed:
            return
        try:
            self._restart(reason)
        except Exception:
            traceback.print_exc()
            os._exit(1)

    def _restart(self, reason: str) -> None:
        """Restarts this process."""
        # Never released: a second thread waits here until the process is replaced.
        self._lock.acquire()
        # The first rank that sees a failure has the best reason. The others may only see that this rank left.
        reason = f"{self._name}: {reason}"
        if self._heartbeat is not None:
            heartbeat, own = self._heartbeat, reason
            reason = within(2.0, lambda: heartbeat.report(own)) or own
        following = self._following(reason)
        for action in self.before_restart:
            within(_FLUSH_S, action)
        if following.num_idle > _MOST_IDLE:
            logger.error(
                "clan: %d generations in a row began with all members and failed before a round was committed. "
                "The death of a member is not the cause. The cause is: %s. %s",
                following.num_idle,
                reason,
                resume_remedy(self._resumable()),
            )
            os._exit(1)
        logger.warning(
            "clan: %s leaves generation %d for generation %d: %s",
            self._name,
            self.generation.number,
            following.number,
            reason,
        )
        following.write(self._environ)
        restart_process(self._environ)

    def _following(self, reason: str) -> Generation:
        """The generation after this one. It also writes the run to resume into the environment."""
        run_dir = self._resumable()
        newest = None
        if run_dir is not None:
            self._environ[RESUME] = run_dir
            newest = committed_rounds(Path(run_dir) / ROUNDS)[0]
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
        """The run's folder, if it holds a committed round."""
        if self.run_dir is None or not committed_rounds(self.run_dir / ROUNDS):
            return None
        return str(self.run_dir)
