"""A rank is killed or hangs. The other members continue as a resume with fewer members would."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from clantune_scale.bench.faults.actions import INJECTED
from clantune_scale.bench.faults.injector import Fault
from clantune_scale.bench.faults.kills import differences
from clantune_scale.bench.faults.results import FaultResult
from clantune_scale.bench.faults.workload import Workload, events, last_words, stood, uninterrupted

WHAT = "SIGKILL of a rank, the other members continue"
#: Point, step and member of the fault.
POINTS = (
    ("forward", 7, 0),
    ("evaluation", 10, 1),
    ("transfer:after", 10, 2),
    ("commit:after", 10, 0),
    ("step", 11, 1),
)
#: The hardest case: this process serves the store, and accepts connections without answering.
HANG = ("forward", 12, 0)
#: Deadline for a hanging rank; a killed one is noticed at once.
_HANG_S = 20.0


def inject(workload: Workload, name: str, folder: Path) -> Iterator[FaultResult]:
    """Kills in a clan of three. Each is compared with a resume of two members from the same round."""
    references: dict[tuple[str, int], Path] = {}
    for number, (point, step, member) in enumerate((*POINTS, HANG)):
        began = time.monotonic()
        here = folder / f"death-{number}"
        here.mkdir()
        hangs = number == len(POINTS)
        fault = Fault(member * workload.setup.member_size, point, step, "stop" if hangs else "kill")
        wrong = _lose(workload, fault, here, references)
        what = "SIGSTOP of a rank, the other members continue" if hangs else WHAT
        yield FaultResult(what, name, f"member {member}, {point}, step {step}", wrong, time.monotonic() - began)
    # Two members: from three ranks on, a restart regroups DDP's own sums.
    two = replace(workload, changes={**workload.changes, "members": 2})
    yield from _transfers(two, name, folder)


def _transfers(workload: Workload, name: str, folder: Path) -> Iterator[FaultResult]:
    """Corrupts received data: once, so that it is sent again; twice, so that all resume from the last round."""
    whole = uninterrupted(workload, folder, asynchronous=False)
    for action, what, num_starts in (
        ("spoil-transfer", "a transfer fails once and is retried", 1),
        ("spoil-transfers", "a transfer fails twice: resume from the last committed round", 2),
    ):
        began = time.monotonic()
        here = folder / action
        here.mkdir()
        faults = [Fault(rank, "transfer", 10, action) for rank in range(workload.setup.world_size)]
        ended = workload.launch(here, *faults, block=_block(workload, here))
        wrong = last_words(ended) if any(rank.code for rank in ended) else differences(stood(here), stood(whole))
        if not wrong and not any(INJECTED in rank.text for rank in ended):
            wrong = "the fault was never injected: no rank received a state"
        if not wrong and any(rank.num_starts != num_starts for rank in ended):
            wrong = f"ranks had {[rank.num_starts for rank in ended]} processes"
        yield FaultResult(what, name, "every recipient, step 10", wrong, time.monotonic() - began)


def _block(workload: Workload, folder: Path) -> dict[str, Any]:
    block = workload.block(folder, asynchronous=False, resume="never")
    # On a busy machine a process may be seconds late.
    return block | {"faults": {"min_members": 2, "deadline_s": 30.0, "rejoin_s": 6.0}}


def _lose(workload: Workload, fault: Fault, folder: Path, references: dict[tuple[str, int], Path]) -> str:
    block = _block(workload, folder)
    if fault.action == "stop":
        block["faults"]["deadline_s"] = _HANG_S
    ended = workload.launch(folder, fault, block=block)
    member = fault.rank // workload.setup.member_size
    if ended[fault.rank].code != -signal.SIGKILL:
        return f"the fault was never injected: rank {fault.rank} ended with {ended[fault.rank].code}"
    left = [rank for number, rank in enumerate(ended) if number // workload.setup.member_size != member]
    if any(rank.code for rank in left):
        return last_words(left)
    if any(rank.num_starts != 2 for rank in left):
        return f"survivors had {[rank.num_starts for rank in left]} processes"
    told = events(folder, "member_lost")
    if [event["left"] for event in told] != [[m for m in range(workload.setup.members) if m != member]]:
        return f"the events have {told}"
    (resume,) = events(folder, "resume")
    round_name = Path(resume["resumed_from"]).name
    key = (round_name, workload.setup.members)
    if key not in references:
        references[key] = _resumed(workload, folder, round_name)
    theirs = list(stood(references[key]).values())
    return differences(_plain(stood(folder).values()), _plain(theirs))


def _plain(ranks: Any) -> dict[str, dict[str, Any]]:
    """By position: survivors keep their launched numbers."""
    return {str(place): dict(rank) for place, rank in enumerate(ranks)}


def _resumed(workload: Workload, folder: Path, round_name: str) -> Path:
    """Resumes a copy of the run from one of its rounds with one member fewer; returns its folder."""
    copy = folder / "resumed"
    shutil.copytree(folder / "run", copy / "run", ignore=shutil.ignore_patterns(".lock"))
    from_round = str(copy / "run" / "rounds" / round_name)
    block = workload.block(copy, asynchronous=False, resume=from_round, allow=["population_size"])
    ended = workload.launch(copy, block=block | {"population_size": workload.setup.members - 1})
    if any(rank.code for rank in ended):
        raise RuntimeError(f"the reference run did not resume: {last_words(ended)}")
    return copy
