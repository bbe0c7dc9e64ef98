"""Damaged files of a committed round, and a full disk."""

from __future__ import annotations

import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clantune_scale.bench.faults.injector import Fault
from clantune_scale.bench.faults.kills import differences
from clantune_scale.bench.faults.results import FaultResult
from clantune_scale.bench.faults.workload import Workload, events, last_words, stood, uninterrupted
from clantune_scale.checkpoint import manifest
from clantune_scale.checkpoint.restore import fault_of
from clantune_scale.distributed.topology import Topology
from clantune_scale.errors import CheckpointError
from clantune_scale.tracking.run_dir import committed_rounds

NUM_FLIPS = 1000
_NEWEST, _BEFORE = "round-000002", "round-000001"


def inject(workload: Workload, name: str, folder: Path) -> Iterator[FaultResult]:
    """Runs this section on the rounds of one uninterrupted run."""
    whole = uninterrupted(workload, folder, asynchronous=False)
    yield from _flips(workload, name, whole, folder / "flips")
    yield from _resumes(workload, name, whole, folder)
    yield from _full_disk(workload, name, whole, folder / "disk")


def _flips(workload: Workload, name: str, whole: Path, folder: Path) -> Iterator[FaultResult]:
    """Flips single bits at random places, in turn over all files of a round; every rank checks its files."""
    shutil.copytree(whole / "run" / "rounds" / _NEWEST, folder)
    setup = workload.setup
    grid = Topology.from_world(setup.world_size, population_size=setup.members, pp=setup.pp, tp=setup.tp)
    before, files = manifest.read(folder), _files(folder)
    generator = random.Random(0)
    for number in range(NUM_FLIPS):
        path = files[number % len(files)]
        data = path.read_bytes()
        place, bit = generator.randrange(len(data)), generator.randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
        # A change of the manifest's white space has no effect.
        is_seen = _fault(folder, setup, grid) or manifest.read(folder) == before
        path.write_bytes(data)
        wrong = "" if is_seen else "no rank noticed it"
        yield FaultResult("a flipped bit in a round's files", name, f"{path.name}, byte {place}, bit {bit}", wrong)


def _fault(folder: Path, setup: Any, grid: Topology) -> str | None:
    try:
        content = manifest.read(folder)
    except CheckpointError as error:
        return str(error)
    ranks = range(setup.world_size)
    faults = (fault_of(folder, content, grid.coordinates(rank), range(setup.members), grid) for rank in ranks)
    return next((fault for fault in faults if fault is not None), None)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


_SPOILS: dict[str, Callable[[Path], None]] = {
    "a flipped bit, then a resume": _flip,
    "a truncated file, then a resume": _truncate,
    "a missing file, then a resume": Path.unlink,
}


def _resumes(workload: Workload, name: str, whole: Path, folder: Path) -> Iterator[FaultResult]:
    """Damages one file of each kind and resumes: the run must resume from the round before and reach the same end."""
    kinds: dict[str, Path] = {}
    for path in _files(whole / "run" / "rounds" / _NEWEST):
        is_at_top = path.parent.name == _NEWEST
        kinds.setdefault(path.name if is_at_top else path.suffix or path.name, path.relative_to(whole / "run"))
    for what, spoil in _SPOILS.items():
        for kind in kinds.values():
            began = time.monotonic()
            here = folder / "spoilt"
            shutil.copytree(whole / "run", here / "run")
            spoil(here / "run" / kind)
            # The leftovers of a process that died while it wrote, and an incomplete pointer.
            (here / "run" / "rounds" / ".round-000003.1.partial").mkdir()
            (here / "run" / "rounds" / "LATEST").write_bytes(b"\x00part")
            wrong = _resume(workload, here, whole, kind.name)
            yield FaultResult(what, name, str(kind), wrong, time.monotonic() - began)
            shutil.rmtree(here)
    yield _nothing_left(workload, name, whole, folder / "spoilt")


def _resume(workload: Workload, folder: Path, whole: Path, spoilt: str) -> str:
    ended = workload.launch(folder, block=workload.block(folder, resume=str(folder / "run"), asynchronous=False))
    if any(rank.code for rank in ended):
        return last_words(ended)
    (resume,) = events(folder, "resume")
    if Path(resume["resumed_from"]).name != _BEFORE:
        return f"resumed from {resume['resumed_from']}"
    said = " ".join(event["message"] for event in events(folder, "warning"))
    if _NEWEST not in said or spoilt not in said:
        return f"no warning names {_NEWEST} and {spoilt}: {said}"
    if not (folder / "run" / "rounds" / "lost-1" / _NEWEST).exists():
        return "the damaged round was deleted"
    return differences(stood(folder), stood(whole))


def _nothing_left(workload: Workload, name: str, whole: Path, folder: Path) -> FaultResult:
    shutil.copytree(whole / "run", folder / "run")
    names = committed_rounds(folder / "run" / "rounds")
    for round_name in names:
        _truncate(folder / "run" / "rounds" / round_name / "clan.json")
    ended = workload.launch(folder, block=workload.block(folder, resume=str(folder / "run")))
    told = ended[0].text
    has_passed = all(rank.code for rank in ended) and all(round_name in told for round_name in names)
    has_passed = has_passed and "start anew" in told
    shutil.rmtree(folder)
    return FaultResult("every round damaged", name, "clan.json", "" if has_passed else told[-500:])


def _full_disk(workload: Workload, name: str, whole: Path, folder: Path) -> Iterator[FaultResult]:
    """Fills a disk of 16 MB in the second round and frees it in the third."""
    what = "a full disk (ENOSPC) in training"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        yield FaultResult(what, name, "not run", f"no file system could be mounted: {mounted.stderr.strip()}")
        return
    began = time.monotonic()
    try:
        faults = [Fault(0, "step", 7, "fill-disk"), Fault(0, "step", 13, "free-disk")]
        block = workload.block(folder, asynchronous=False)
        ended = workload.launch(folder, *faults, block=block)
        wrong = last_words(ended) if any(rank.code for rank in ended) else _after_full_disk(folder, whole, ended)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    yield FaultResult(what, name, "steps 7 to 13", wrong, time.monotonic() - began)


def _after_full_disk(folder: Path, whole: Path, ended: list) -> str:
    if "is full" not in ended[0].text:
        return "no rank reported that the disk is full"
    if committed_rounds(folder / "run" / "rounds") != [_NEWEST, "round-000000"]:
        return f"committed: {committed_rounds(folder / 'run' / 'rounds')}"
    if not any(_BEFORE in event["message"] for event in events(folder, "warning")):
        return f"no warning names {_BEFORE}"
    steps = [event["step"] for event in events(folder, "step")]
    if steps != [event["step"] for event in events(whole, "step")]:
        return f"events are missing: {steps}"
    return differences(stood(folder), stood(whole))
