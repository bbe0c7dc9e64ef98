"""A member's numbers go wrong: it is left out, told of and replaced, and nobody else's are touched."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

from clantune_scale.bench.faults.actions import STRUCK
from clantune_scale.bench.faults.injector import Fault
from clantune_scale.bench.faults.kills import last_words
from clantune_scale.bench.faults.results import FaultResult
from clantune_scale.bench.faults.workload import STEPS, Workload, events, stood

ACTIONS = ("nan-loss", "inf-loss", "nan-gradient", "inf-gradient", "nan-weights", "inf-weights")
_SICK = 1


def strike(workload: Workload, name: str, folder: Path) -> Iterator[FaultResult]:
    """Each action on member 1's first rank, in a cooperative step or, with a strategy that competes, in such a one."""
    competes = workload.strategy == "classic"
    for action in ACTIONS:
        began = time.monotonic()
        here = folder / action
        here.mkdir()
        # Steps 8 and 9 compete. Weights that go wrong at the end of a step are met by the second one after it: engines
        # whose masters are apart compute the next with what they have.
        is_late = action.endswith("weights")
        point = "step" if is_late else "forward"
        step = 6 if not competes else 7 if is_late else 8
        fault = Fault(_SICK * workload.setup.member_size, point, step, action)
        ended = workload.launch(here, fault)
        wrong = last_words(ended) if any(rank.code for rank in ended) else _wrong(here, action, competes)
        if not wrong and STRUCK not in ended[fault.rank].text:
            wrong = "the fault never struck"
        phase = "competitive" if competes else "cooperative"
        told = f"{action}, member {_SICK}, step {step}, {phase}"
        what = f"NaN or Inf in a member's {action.partition('-')[2]}"
        yield FaultResult(what, name, told, wrong, time.monotonic() - began)


def _wrong(folder: Path, action: str, competes: bool) -> str:
    ranks = stood(folder)
    bad = [rank for rank, found in ranks.items() if not found["finite"]]
    if bad:
        return f"weights are not finite on {bad}"
    rounds = events(folder, "round_end")
    struck = rounds[1]["members"]
    strikes = {member["member"]: member["strikes"] for member in struck if member["strikes"]}
    # A member that competes is its engine alone: a gradient that is not finite is in its next loss, or the engine has
    # left that step out, and an infinite activation may be saturated away.
    is_certain = not competes or action in ("nan-loss", "nan-weights", "inf-weights")
    if set(strikes) - {_SICK} or (is_certain and not strikes):
        return f"strikes by member: {strikes}"
    others = [member["loss"] for member in struck if member["member"] != _SICK]
    if not all(map(math.isfinite, others)):
        return f"losses of the other members: {others}"
    if action.endswith("weights") and struck[_SICK]["donor"] == _SICK:
        return "a member without finite weights was kept"
    last = [member["loss"] for member in rounds[-1]["members"]]
    values = [value for member in rounds[-1]["members"] for value in member["next_genome"]["values"].values()]
    if not all(map(math.isfinite, last + values)):
        return f"losses {last} and genes {values} in the last round"
    (end,) = events(folder, "run_end")
    return "" if (end["status"], end["step"]) == ("FINISHED", STEPS) else f"ended as {end}"
