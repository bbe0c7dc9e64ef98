"""The rendezvous of a generation after the first: one member serves the store, the quorum closes, all ranks read it.

The store is at the address of a member's store of the generation before: all ranks know these addresses, and the ports
are free again. The first member serves it. If that member is gone, the next one serves it after it has probed all
addresses without success for ``rejoin_s``.
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

#: Seconds that one request may take: a frozen process accepts connections and does not answer.
_ANSWER_S = 5.0
_PAUSE_S = 0.25
# Candidates that start at the same moment must not start to serve at the same moment.
_STAGGER_S = 2.0
#: Seconds added to every deadline for slow hosts.
_MARGIN_S = 30.0
FOLDER = "generations"


@dataclass(frozen=True)
class Quorum:
    """The members that take part in a generation.

    Attributes:
        members: the numbers that they were launched with.
        missing: what is known of each missing member, for messages.
        stop: why the run cannot continue with these members; empty if it can.
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
    """One rank's part in the rendezvous of a generation.

    Args:
        generation: the one that begins.
        member, member_rank: the numbers that this rank was launched with.
        member_size: number of ranks of a complete member.
        min_members: the run stops with fewer members.
        rejoin_s: seconds from the first arrival until the quorum closes.
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
        """The most seconds that :meth:`attend` takes if the host of the store answers."""
        return 3 * self._rejoin_s + (len(self._generation.members) + 1) * _STAGGER_S + 3 * _MARGIN_S

    def attend(self) -> tuple[Store, Quorum]:
        """Finds or serves the store, registers this rank, and reads the quorum when it is closed.

        Returns:
            The clan's store in this generation, and the quorum.

        Raises:
            MembersLostError: if no store is found, this rank's member is not in the quorum, or the quorum is too small.
            DistError: if the host of the store dies during the rendezvous.
        """
        store, serves = self._enter()
        arrive(store, self._generation.members, self._member, self._member_rank, self._member_size)
        if serves:
            store.set("quorum", self._claim(self._close(store)).to_json())
        store.wait(["quorum"], timedelta(seconds=self._rejoin_s + _MARGIN_S))
        quorum = Quorum.from_json(store.get("quorum"))
        if quorum.stop:
            # The host of the store must not leave before the others have read the reason.
            within(_ANSWER_S, lambda: _await_readers(store))
            raise MembersLostError(quorum.stop)
        if self._member not in quorum.members:
            raise MembersLostError(
                f"generation {self._generation.number} began without member {self._member}: "
                f"{quorum.missing.get(self._member, 'it came too late')}. This rank ends. Launch again and resume the "
                f"run to bring the member back."
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
        probed = [f"{host}:{port}" for host, port in self._generation.addresses]
        raise MembersLostError(
            f"nobody serves the store of generation {self._generation.number}: members "
            f"{list(self._generation.members)} were probed at {probed} for {give_up_s:g} s. {self.remedy()}"
        )

    def _serve(self) -> Store | None:
        """Serves the store at the address of this member's own; None if the port is not free yet."""
        host, port = self._generation.addresses[self._place]
        try:
            tcp_store = serve(host, port, timeout_s=self._rejoin_s)
        except (DistError, OSError):
            return None
        store = PrefixStore(prefix(self._generation.number), tcp_store)
        store.set("open", "")
        return store

    def _close(self, store: Store) -> Quorum:
        """Waits until all ranks have arrived, at most until the deadline, and closes the quorum."""
        # A rank that serves because an earlier member is gone has waited already, and so have the others.
        seconds = max(_ANSWER_S, self._rejoin_s - (time.monotonic() - self._began))
        # After the deadline the generation begins with the members that are complete.
        with suppress(DistError):
            store.wait(["arrived/all"], timedelta(seconds=seconds))
        return close(store, self._generation, self._member_size, self._min_members, self.remedy())

    def _claim(self, quorum: Quorum) -> Quorum:
        """The quorum, with a reason to stop if another part of the clan has begun this generation already.

        After a network partition two parts of the clan each close a quorum. Only the part that creates the file first
        continues.
        """
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
                f"{list(quorum.members)} cannot reach them. This part of the clan ends. Check the network between "
                f"their hosts.",
            )
        return quorum

    def remedy(self) -> str:
        """What to do to continue the run."""
        return resume_remedy(self._generation.run_dir)


def resume_remedy(run_dir: str | None) -> str:
    """What to do after a run has stopped because members were lost.

    Args:
        run_dir: the run's folder; None if no round was committed.
    """
    if run_dir is None:
        return "No round was committed. Launch again."
    return f"Launch again with CLANTUNE_RESUME={run_dir} in the environment to resume from the last committed round."


def prefix(number: int) -> str:
    """The prefix of a generation's keys. It tells a server of another generation from this one's."""
    return f"clan/generation/{number}"


def arrive(store: Store, members: tuple[int, ...], member: int, member_rank: int, member_size: int) -> None:
    """Registers this rank. The last rank of all sets the key that closes the quorum early."""
    store.set(f"arrived/{member}/{member_rank}", "")
    store.add("arrived", 1)
    if store.add(f"arrived/{member}", 1) == member_size and store.add("complete", 1) == len(members):
        store.set("arrived/all", "")


@contextmanager
def _probes(addresses: Sequence[Address], number: int) -> Iterator[queue.SimpleQueue[Store]]:
    """Probes each address repeatedly, on a thread of its own, and yields the queue of the stores that answer.

    In sequence, one frozen host would delay the probe of the next one so much that two candidates start to serve.
    """
    answers: queue.SimpleQueue[Store] = queue.SimpleQueue()
    is_over = threading.Event()

    def probe_until_over(address: Address) -> None:
        while not is_over.is_set():
            store = probe(address, number)
            if store is not None:
                answers.put(store)
                return
            is_over.wait(_PAUSE_S)

    for address in addresses:
        threading.Thread(target=probe_until_over, args=(address,), name="clantune-probe", daemon=True).start()
    try:
        yield answers
    finally:
        is_over.set()


def _await_readers(store: Store) -> None:
    """Waits until all ranks that have arrived have read the quorum."""
    store.add("read", 1)
    while store.add("read", 0) < store.add("arrived", 0):
        time.sleep(_PAUSE_S)


def close(store: Store, generation: Generation, member_size: int, min_members: int, remedy: str) -> Quorum:
    """The quorum of the members that are complete now.

    Args:
        store: the clan's in this generation.
        generation: the one that begins.
        member_size: number of ranks of a complete member.
        min_members: with fewer, the quorum says why the run stops.
        remedy: what to do then.
    """
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
            f"{len(present)} members are left and clantune.faults.min_members is {min_members} ({told}; first failure: "
            f"{generation.failure}). {remedy}"
        )
    return Quorum(present, missing, stop)


def _keys(member: int, member_size: int) -> list[str]:
    return [f"arrived/{member}/{rank}" for rank in range(member_size)]


def probe(address: Address, number: int) -> Store | None:
    """The store at an address, if it serves this generation; None otherwise."""

    def connect() -> Store | None:
        # Torch prints every refused connection to the terminal. A plain socket finds out silently.
        socket.create_connection(address, timeout=_ANSWER_S).close()
        store = PrefixStore(
            prefix(number),
            TCPStore(*address, is_master=False, timeout=timedelta(seconds=_ANSWER_S), wait_for_workers=False),
        )
        return store if store.check(["open"]) else None

    return within(_ANSWER_S, connect)


def within(seconds: float, request: Callable[[], Any]) -> Any:
    """What ``request`` returns; None if it reaches no host or does not return in time.

    A call on a store whose host is frozen never returns. Its thread is left behind.
    """
    answers: list[Any] = []

    def run() -> None:
        try:
            answers.append(request())
        except (OSError, DistError):
            answers.append(None)

    thread = threading.Thread(target=run, name="clantune-request", daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else None
