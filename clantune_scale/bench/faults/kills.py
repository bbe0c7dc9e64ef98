"""A rank is killed in each phase of the protocol. The same launch is repeated and must end as an uninterrupted run."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from clantune_scale.bench.faults.injector import Fault
from clantune_scale.bench.faults.results import FaultResult
from clantune_scale.bench.faults.workload import (
    ROUND,
    STEPS,
    Workload,
    digest,
    events,
    last_words,
    stood,
    uninterrupted,
)
from clantune_scale.tracking.run_dir import ROUNDS, committed_rounds

#: By action, and by what the repeated launch did: it resumed, started again, or found the run finished.
WHAT = {
    "kill": "SIGKILL of a rank, then the same launch again",
    "terminate": "SIGTERM to all ranks, then the same launch again",
}
RESUMED, ANEW, OVER = "it resumes", "it starts again: no round was committed yet", "the run had finished"

#: Point, and number of optimizer steps before it; None if it is reached once. Round 1 ends at step 10, and its
#: competitive phase, if the strategy has one, begins at step 8.
POINTS: tuple[tuple[str, int | None], ...] = (
    ("join", None),
    ("start", None),
    ("forward", 7),
    ("forward", 9),
    ("step", 11),
    ("evaluation", 10),
    ("diagnostics", 10),
    ("decision", 10),
    ("transfer", 10),
    ("record", 10),
    ("commit", 10),
    ("manifest", 10),
    ("latest", 10),
    ("phase", 10),
    ("finish", None),
    ("champion", None),
)
#: A launcher would then end the others; most ranks notice by themselves that one is gone.
_PATIENCE_S = 10.0
#: Done by the first rank only, at the round's end if rounds are written synchronously.
_LEADERS = ("manifest", "latest")


def faults(place: int, world_size: int, member_size: int) -> Iterator[Fault]:
    """Every second point for one workload and the others for the next; in turn at its begin and at its end.

    Args:
        place: index of the workload.
        world_size: number of its ranks, which are killed in turn.
        member_size: ranks of a member; its first rank reads batches on every engine.
    """
    for number, (point, step) in enumerate(POINTS):
        if (number + place) % 2 == 0:
            moment = ":after" if (number // 2 + place // 2) % 2 else ""
            rank = 0 if point in _LEADERS else (number // 2 + place) % world_size
            rank -= rank % member_size if point == "forward" else 0
            yield Fault(rank, point + moment, step)


def inject(workload: Workload, name: str, place: int, folder: Path) -> Iterator[FaultResult]:
    """Compares each kill of a workload with its uninterrupted run."""
    whole = uninterrupted(workload, folder)
    ranks = range(workload.setup.world_size)
    kills = [[fault] for fault in faults(place, len(ranks), workload.setup.member_size)]
    # Ranks compare whether a signal came at step 8 for the first time: all stop there, inside a round.
    terms = [[Fault(rank, "step", 3 + place % 5, "terminate") for rank in ranks]]
    for number, injected in enumerate(kills + terms):
        began = time.monotonic()
        here = folder / f"kill-{number}"
        here.mkdir()
        # Every second workload's rounds are written beside training, unless the point asks for its own moment.
        first = injected[0]
        block = workload.block(here, asynchronous=place % 2 == 0 and first.point.partition(":")[0] not in _LEADERS)
        how, wrong = _stop_and_go_on(workload, injected, block, here, whole)
        told = f"rank {first.rank}, {first.point}" + (f", step {first.step}" if first.step is not None else "")
        yield FaultResult(f"{WHAT[first.action]}: {how}", name, told, wrong, time.monotonic() - began)
        if not wrong:
            shutil.rmtree(here)


def _stop_and_go_on(
    workload: Workload, injected: list[Fault], block: dict[str, Any], folder: Path, whole: Path
) -> tuple[str, str]:
    """What the launch after the fault did, and the first check that failed."""
    stopped = workload.launch(folder, *injected, block=block, patience_s=_PATIENCE_S)
    code = -signal.SIGKILL if injected[0].action == "kill" else 128 + signal.SIGTERM
    if any(stopped[one.rank].code != code for one in injected):
        return RESUMED, f"the fault was never injected: ranks ended with {[rank.code for rank in stopped]}, not {code}"
    if any(event["status"] == "FINISHED" for event in _ends(folder)):
        # The same launch would begin another run.
        return OVER, _outcome(folder, whole)
    for path in folder.glob("stood-*.json"):
        path.unlink()
    committed = committed_rounds(folder / "run" / ROUNDS)
    how = RESUMED if committed else ANEW
    ended = workload.launch(folder, block=block)
    if any(rank.code for rank in ended):
        return how, last_words(ended)
    resumes = [Path(event["resumed_from"]).name for event in events(folder, "resume", _newest(folder))]
    if resumes != committed[:1]:
        return how, f"{committed[:1]} was committed, but the launch resumed from {resumes}"
    return how, _outcome(folder, whole)


def _outcome(folder: Path, whole: Path) -> str:
    return differences(stood(folder), stood(whole)) or _record_faults(folder, whole)


def differences(ours: Mapping[str, Mapping], theirs: Mapping[str, Mapping]) -> str:
    """The differences by rank; empty if there are none."""
    if ours.keys() != theirs.keys() or not ours:
        return f"ranks {sorted(ours)} ended, not {sorted(theirs)}"
    wrong = {
        rank: sorted(key for key in theirs[rank] if ours[rank].get(key) != theirs[rank][key]) for rank in sorted(theirs)
    }
    wrong = {rank: keys for rank, keys in wrong.items() if keys}
    return f"not equal to the last bit: {wrong}" if wrong else ""


def _record_faults(folder: Path, whole: Path) -> str:
    """Checks that events have each round once and one end, that the champion is equal, and that no file is partial."""
    run = _newest(folder)
    indices = [event["round"] for event in events(folder, "round_end", run)]
    if indices != list(range(STEPS // ROUND)):
        return f"the events have the rounds {indices}"
    if [event["status"] for event in events(folder, "run_end", run)] != ["FINISHED"]:
        return "the events do not have exactly one run_end"
    if not _champion(whole / "run") or _champion(folder / run) != _champion(whole / "run"):
        return "the champion is another one"
    leftovers = [path.name for path in (folder / run / "rounds").glob(".*") if path.name != ".lock"]
    return f"left behind: {leftovers}" if leftovers else ""


def _champion(run_dir: Path) -> dict[str, str]:
    return {path.name: digest(load_file(path)) for path in run_dir.glob("champion*.safetensors")}


def _newest(folder: Path) -> str:
    """The newest run: a launch that found no committed round starts a new run beside the old one."""
    return max((path.parent.name for path in folder.glob("run*/events.jsonl")), key=lambda name: (len(name), name))


def _ends(folder: Path) -> list[dict]:
    return [event for path in folder.glob("run*/events.jsonl") for event in events(folder, "run_end", path.parent.name)]
