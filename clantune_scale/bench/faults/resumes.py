"""Two launches of one run at the same time, and a resume with changed settings."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from clantune_scale.bench.faults.actions import GO_ON
from clantune_scale.bench.faults.injector import Fault
from clantune_scale.bench.faults.kills import differences
from clantune_scale.bench.faults.results import FaultResult
from clantune_scale.bench.faults.workload import Workload, events, last_words, stood, uninterrupted

#: By the setting that the refusal names: changes of the set-up, and changes of the block.
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "population_size": ({}, {"population_size": 3}),
    "topology": ({"dp": 1}, {}),
    "batch": ({"accumulation": 3}, {}),
    "optimizer": ({"optimizer": "sgd"}, {}),
    "round_length": ({}, {"round_length": 6}),
    "duty_cycle": ({}, {"duty_cycle": 0.3}),
    "seed": ({}, {"seed": 1}),
    "total_steps": ({}, {"total_steps": 60}),
    "strategy": ({}, {"strategy": "pbt"}),
    "genes": ({}, {"genes": ["lr", "beta1"]}),
    "fitness": ({}, {"fitness": {"num_samples": 32, "batch_size": 8}}),
    "nonfinite_mask": ({}, {"faults": {"deadline_s": 30.0, "nonfinite_mask": False}}),
}
_UNFIT = "a resume with changed settings"


def inject(workload: Workload, name: str, other: Workload, folder: Path) -> Iterator[FaultResult]:
    """Compares both with one uninterrupted run.

    Args:
        workload: of the run.
        name: of the workload in the table.
        other: one with other parameters.
        folder: an empty one.
    """
    whole = uninterrupted(workload, folder)
    yield from _two_runs(workload, name, folder / "two", whole)
    yield from _unfit(workload, name, other, folder / "unfit", whole)


def _two_runs(workload: Workload, name: str, folder: Path, whole: Path) -> Iterator[FaultResult]:
    """While one run waits, a second launch resumes it and a third starts a run of the same name."""
    folder.mkdir()
    first: list = []
    fault = Fault(1, "step", 11, "wait")
    thread = threading.Thread(target=lambda: first.extend(workload.launch(folder, fault)))
    thread.start()
    _wait_for_rounds(folder)
    began = time.monotonic()
    second = workload.launch(folder)
    wrong = ""
    if not all(rank.code for rank in second) or "is being written by process" not in second[0].text:
        wrong = f"the second launch ended with {[rank.code for rank in second]}: {second[0].text[-300:]}"
    yield FaultResult("a launch that resumes a running run", name, "latest", wrong, time.monotonic() - began)
    began = time.monotonic()
    third = workload.launch(folder, block=workload.block(folder, resume="never"))
    wrong = last_words(third) if any(rank.code for rank in third) else differences(stood(folder), stood(whole))
    if not wrong and events(folder, "run_end", "run-2")[-1]["status"] != "FINISHED":
        wrong = "run-2 did not finish"
    yield FaultResult("two runs with one name in one folder", name, "the second", wrong, time.monotonic() - began)
    (folder / GO_ON).touch()
    thread.join()
    wrong = last_words(first) if any(rank.code for rank in first) else differences(stood(folder), stood(whole))
    yield FaultResult("two runs with one name in one folder", name, "the first", wrong)


def _wait_for_rounds(folder: Path) -> None:
    path = folder / "run" / "events.jsonl"
    ends = time.monotonic() + 120
    while not (path.exists() and len(events(folder, "round_end")) >= 2):
        if time.monotonic() > ends:
            raise TimeoutError(f"no second round in {path} after 120 s")
        time.sleep(0.05)


def _unfit(workload: Workload, name: str, other: Workload, folder: Path, whole: Path) -> Iterator[FaultResult]:
    """Each changed setting is refused by name and leaves the run unchanged; the original settings then resume it."""
    folder.mkdir()
    killed = workload.launch(folder, Fault(0, "step", 16))
    before = _contents(folder)
    variants = {
        what: (replace(workload, changes={**workload.changes, **changes}), block)
        for what, (changes, block) in OTHERS.items()
    }
    variants["parameters"] = (other, {})
    for what, (variant, changed) in variants.items():
        began = time.monotonic()
        ended = variant.launch(folder, block=variant.block(folder) | changed)
        told = ended[0].text
        wrong = ""
        if not all(rank.code for rank in ended) or what not in told or "was saved, this launch has" not in told:
            wrong = f"ranks ended with {[rank.code for rank in ended]}: {told[-300:]}"
        elif _contents(folder) != before:
            wrong = f"{set(_contents(folder).items()) ^ set(before.items())} changed"
        yield FaultResult(_UNFIT, name, what, wrong, time.monotonic() - began)
    ended = workload.launch(folder)
    wrong = last_words(ended) if any(rank.code for rank in ended) else differences(stood(folder), stood(whole))
    wrong = wrong or ("" if killed[0].code == -9 else f"the run was not killed: exit code {killed[0].code}")
    yield FaultResult(_UNFIT, name, "the original settings", wrong)
    shutil.rmtree(folder)


def _contents(folder: Path) -> dict[str, int]:
    """The run's files and their lengths, without its lock file."""
    files = (path for path in (folder / "run").rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}
