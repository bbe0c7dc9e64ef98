"""A member has non-finite numbers. It must be masked, reported and replaced, without effect on the other members."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

from clantune_scale.bench.faults.actions import INJECTED
from clantune_scale.bench.faults.injector import Fault
from clantune_scale.bench.faults.kills import last_words
from clantune_scale.bench.faults.results import FaultResult
from clantune_scale.bench.faults.workload import STEPS, Workload, events, stood

ACTIONS = ("nan-loss", "inf-loss", "nan-gradient", "inf-gradient", "nan-weights", "inf-weights")
_SICK = 1


def inject(workload: Workload, name: str, folder: Path) -> Iterator[FaultResult]:
    """Injects each action on member 1's first rank, in a competitive step if the strategy has one."""
    competes = workload.strategy == "classic"
    for action in ACTIONS:
        began = time.monotonic()
        here = folder / action
        here.mkdir()
        # Steps 8 and 9 compete. Weights that are changed at the end of a step take effect two steps later: an engine
        # with separate masters computes the next step with the weights that it already has.
        is_late = action.endswith("weights")
        point = "step" if is_late else "forward"
        step = 6 if not competes else 7 if is_late else 8
        fault = Fault(_SICK * workload.setup.member_size, point, step, action)
        ended = workload.launch(here, fault)
        wrong = last_words(ended) if any(rank.code for rank in ended) else _wrong(here, action, competes)
        if not wrong and INJECTED not in ended[fault.rank].text:
            wrong = "the fault was never injected"
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
    members = rounds[1]["members"]
    counts = {member["member"]: member["strikes"] for member in members if member["strikes"]}
    # A competing member shares no gradients: a non-finite gradient shows in its next loss unless the engine skipped
    # that step, and an infinite activation may saturate.
    is_certain = not competes or action in ("nan-loss", "nan-weights", "inf-weights")
    if set(counts) - {_SICK} or (is_certain and not counts):
        return f"non-finite micro-batches by member: {counts}"
    others = [member["loss"] for member in members if member["member"] != _SICK]
    if not all(map(math.isfinite, others)):
        return f"losses of the other members: {others}"
    if action.endswith("weights") and members[_SICK]["donor"] == _SICK:
        return "a member with non-finite weights was not replaced"
    last = [member["loss"] for member in rounds[-1]["members"]]
    values = [value for member in rounds[-1]["members"] for value in member["next_genome"]["values"].values()]
    if not all(map(math.isfinite, last + values)):
        return f"losses {last} and genes {values} in the last round"
    (end,) = events(folder, "run_end")
    return "" if (end["status"], end["step"]) == ("FINISHED", STEPS) else f"ended as {end}"
