"""Who comes to an epoch after the first: one member serves the store, the roster closes, and all read it.

The store is where a member's own store was in the epoch before: all know these addresses, and the ports are free
again. The first member of the roster serves it; where that one is gone, the next one does after it has looked for a
server in vain for ``rejoin_s``.
"""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from clantune_scale.distributed.bootstrap import Address, unset
from clantune_scale.distributed.elastic.generation import Generation
from clantune_scale.distributed.store import serve
from clantune_scale.errors import MembersLostError

#: Seconds that one question to an address may take: a frozen process accepts connections and does not answer.
_ANSWER_S = 5.0
_PAUSE_S = 0.25
# Candidates that start at the same moment must not begin to serve at the same moment.
_STAGGER_S = 2.0
#: Seconds more than it should take, after which there is no use in waiting.
_MARGIN_S = 30.0
FOLDER = "generations"


@dataclass(frozen=True)
class Quorum:
    """Who takes part in an epoch.

    Attributes:
        members: by the numbers that they were launched with.
        missing: what is known of each of the others, for messages.
        stop: why the run cannot go on with these members; empty where it can.
    """

    members: tuple[int, ...]
    missing: dict[int, str] = field(default_factory=dict)
    stop: str = ""

    def to_json(self) -> str:
        """As text, for a store or a file."""
        return json.dumps([self.members, list(self.missing.items()), self.stop])

    @classmethod
    def from_json(cls, text: str | bytes) -> Quorum:
        """What :meth:`to_json` wrote."""
        members, missing, stop = json.loads(text)
        return cls(tuple(members), dict(missing), stop)


class Rendezvous:
    """One rank's way into an epoch.

    Args:
        epoch: the one that begins.
        member, member_rank: this rank, by the numbers that it was launched with.
        member_size: ranks that make a member complete.
        min_members: with fewer the run stops.
        rejoin_s: seconds from the first arrival until the roster closes.
    """

    def __init__(
        self,
        generation: Generation,
        *,
        member: int,
        member_rank: int,
        member_size: int,
        min_members: int,
        rejoin_s: float,
    ) -> None:
        self._generation, self._member, self._member_rank, self._member_size = (
            generation,
            member,
            member_rank,
            member_size,
        )
        self._min_members, self._rejoin_s = min_members, rejoin_s
        self._place = generation.members.index(member)
        self._began = time.monotonic()

    @property
    def longest_s(self) -> float:
        """Seconds that it takes at most, if whoever serves the store answers."""
        return 3 * self._rejoin_s + (len(self._generation.members) + 1) * _STAGGER_S + 3 * _MARGIN_S

    def attend(self) -> tuple[Store, Quorum]:
        """Finds or serves the store, arrives, and reads the roster when it is closed.

        Raises:
            MembersLostError: if no store is found, this rank's member is not on the roster, or too few are.
            DistError: if who serves the store dies meanwhile.
        """
        store, serves = self._enter()
        arrive(store, self._generation.members, self._member, self._member_rank, self._member_size)
        if serves:
            store.set("quorum", self._claimed(self._close(store)).to_json())
        store.wait(["quorum"], timedelta(seconds=self._rejoin_s + _MARGIN_S))
        quorum = Quorum.from_json(store.get("quorum"))
        if quorum.stop:
            # Who serves the store must not leave before the others have read why.
            within(_ANSWER_S, lambda: _await_readers(store))
            raise MembersLostError(quorum.stop)
        if self._member not in quorum.members:
            raise MembersLostError(
                f"generation {self._generation.number} began without member {self._member}: "
                f"{quorum.missing.get(self._member, 'it came too late')}. This rank ends; the member may come back "
                f"with a new launch that resumes the run."
            )
        return store, quorum

    def _enter(self) -> tuple[Store, bool]:
        """The store, and whether this process serves it."""
        serve_after_s = None
        if self._member_rank == 0:
            serve_after_s = self._place and self._rejoin_s + self._place * _STAGGER_S
        give_up_s = 2 * self._rejoin_s + (len(self._generation.members) + 1) * _STAGGER_S + _MARGIN_S
        with _probes(self._generation.addresses, self._generation.number) as answers:
            while time.monotonic() - self._began < give_up_s:
                with suppress(queue.Empty):
                    return answers.get(timeout=_PAUSE_S), False
                if serve_after_s is not None and time.monotonic() - self._began >= serve_after_s:
                    store = self._serve()
                    if store is not None:
                        return store, True
        asked = [f"{host}:{port}" for host, port in self._generation.addresses]
        raise MembersLostError(
            f"nobody serves the store of generation {self._generation.number}: members "
            f"{list(self._generation.members)} were asked at {asked} for {give_up_s:g} s. {self.remedy()}"
        )

    def _serve(self) -> Store | None:
        """Serves the store where this member's own was; None where the port is not free yet."""
        host, port = self._generation.addresses[self._place]
        try:
            tcp_store = serve(host, port, timeout_s=self._rejoin_s)
        except (DistError, OSError):
            return None
        store = PrefixStore(prefix(self._generation.number), tcp_store)
        store.set("open", "")
        return store

    def _close(self, store: Store) -> Quorum:
        """Waits until all have come, or not longer than is agreed, and says who is there."""
        # Who serves because another did not has waited already, and the others with it.
        seconds = max(_ANSWER_S, self._rejoin_s - (time.monotonic() - self._began))
        # On the deadline those go on who are there.
        with suppress(DistError):
            store.wait(["arrived/all"], timedelta(seconds=seconds))
        return close(store, self._generation, self._member_size, self._min_members, self.remedy())

    def _claimed(self, quorum: Quorum) -> Quorum:
        """Two halves of a clan that cannot see each other must not both go on: the first to make the file does."""
        if self._generation.run_dir is None or quorum.stop:
            return quorum
        folder = Path(self._generation.run_dir) / FOLDER
        folder.mkdir(exist_ok=True)
        path = folder / f"{self._generation.launch_id}-{self._generation.number:04d}.json"
        try:
            with open(path, "x") as file:
                file.write(quorum.to_json())
        except FileExistsError:
            others = Quorum.from_json(path.read_bytes()).members
            return replace(
                quorum,
                stop=f"generation {self._generation.number} was begun by members {list(others)} ({path}), and members "
                f"{list(quorum.members)} cannot reach them. These end; look at the network between their hosts.",
            )
        return quorum

    def remedy(self) -> str:
        """How the run goes on."""
        return resume_remedy(self._generation.run_dir)


def resume_remedy(run_dir: str | None) -> str:
    """What to do when a run has stopped because members were lost."""
    if run_dir is None:
        return "No round was committed: launch again."
    return f"Launch again, as before and with CLANTUNE_RESUME={run_dir} in the environment: the run goes on from there."


def prefix(number: int) -> str:
    """Under which an epoch's keys are: a server of another epoch is not taken for this one's."""
    return f"clan/generation/{number}"


def arrive(store: Store, members: tuple[int, ...], member: int, member_rank: int, member_size: int) -> None:
    """Writes this rank down; the last of all tells."""
    store.set(f"arrived/{member}/{member_rank}", "")
    store.add("arrived", 1)
    if store.add(f"arrived/{member}", 1) == member_size and store.add("complete", 1) == len(members):
        store.set("arrived/all", "")


@contextmanager
def _probes(addresses: Sequence[Address], number: int) -> Iterator[queue.SimpleQueue[Store]]:
    """Inside, each address is asked again and again, on a thread of its own; yields the stores that answer.

    One after the other, a frozen one would hold up the question to the next by so much that two candidates begin to
    serve at the same moment.
    """
    answers: queue.SimpleQueue[Store] = queue.SimpleQueue()
    is_over = threading.Event()

    def ask(address: Address) -> None:
        while not is_over.is_set():
            store = probe(address, number)
            if store is not None:
                answers.put(store)
                return
            is_over.wait(_PAUSE_S)

    for address in addresses:
        threading.Thread(target=ask, args=(address,), name="clantune-ask", daemon=True).start()
    try:
        yield answers
    finally:
        is_over.set()


def _await_readers(store: Store) -> None:
    """Waits until all who have arrived are here."""
    store.add("read", 1)
    while store.add("read", 0) < store.add("arrived", 0):
        time.sleep(_PAUSE_S)


def close(store: Store, generation: Generation, member_size: int, min_members: int, remedy: str) -> Quorum:
    """The roster of those who have arrived until now."""
    missing = {}
    for member in generation.members:
        count = store.add(f"arrived/{member}", 0)
        if count == 0:
            missing[member] = "none of its ranks came"
        elif count < member_size:
            ranks = [key.rpartition("/")[2] for key in unset(store, _keys(member, member_size))]
            missing[member] = f"of its {member_size} ranks, {', '.join(ranks[:16])} did not come"
    present = tuple(member for member in generation.members if member not in missing)
    stop = ""
    if len(present) < min_members:
        told = "; ".join(f"member {member}: {what}" for member, what in missing.items())
        stop = (
            f"{len(present)} members are left and clantune.faults.min_members is {min_members} ({told}; first seen: "
            f"{generation.failure}). {remedy}"
        )
    return Quorum(present, missing, stop)


def _keys(member: int, member_size: int) -> list[str]:
    return [f"arrived/{member}/{rank}" for rank in range(member_size)]


def probe(address: Address, number: int) -> Store | None:
    """The store at an address, if it serves this epoch."""

    def ask() -> Store | None:
        # Torch tells the terminal of every refused connection; this asks the quiet way first.
        socket.create_connection(address, timeout=_ANSWER_S).close()
        store = PrefixStore(
            prefix(number),
            TCPStore(*address, is_master=False, timeout=timedelta(seconds=_ANSWER_S), wait_for_workers=False),
        )
        return store if store.check(["open"]) else None

    return within(_ANSWER_S, ask)


def within(seconds: float, ask: Callable[[], Any]) -> Any:
    """What ``ask`` returns; None if it fails to reach anybody, or does not return in time.

    Calls on a store whose host is frozen do not return at all: a thread is left behind with them.
    """
    answers: list[Any] = []

    def run() -> None:
        try:
            answers.append(ask())
        except (OSError, DistError):
            answers.append(None)

    thread = threading.Thread(target=run, name="clantune-ask", daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None
