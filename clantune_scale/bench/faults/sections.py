"""The sections of the benchmark, and the engines that each strikes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from clantune_scale.bench.faults import damage, kills, numbers, resumes, survivors, trackers
from clantune_scale.bench.faults.results import FaultResult
from clantune_scale.bench.faults.workload import Workload

#: Two members of two ranks, but for DDP, whose own sums are regrouped by a restart from three ranks on: two of one.
WORKLOADS: dict[str, Workload] = {
    "ZeRO 0": Workload("zero", "0"),
    "ZeRO 1": Workload("zero", "1", strategy="classic"),
    "ZeRO 2": Workload("zero", "2"),
    "ZeRO 3": Workload("zero", "3", strategy="classic"),
    "pipeline": Workload("pipeline", "1-tied"),
    "FSDP2": Workload("fsdp", "dp", strategy="classic"),
    "DDP": Workload("ddp", "three", {"members": 2}),
    "Megatron, pipeline": Workload("megatron", "pp", strategy="classic"),
    "Megatron, tensor": Workload("megatron", "tp"),
}
#: Three members of one rank, so that two are left when one has gone.
THREES: dict[str, Workload] = {
    "ZeRO 1": Workload("zero", "1-three"),
    "FSDP2": Workload("fsdp", "three"),
    "DDP": Workload("ddp", "three"),
    "Megatron": Workload("megatron", "three"),
}
#: Whose numbers go wrong: alone, and in a member of two ranks.
SICK: dict[str, Workload] = {
    "ZeRO 1": Workload("zero", "1-three"),
    "ZeRO 3": Workload("zero", "3", strategy="classic"),
    "pipeline": Workload("pipeline", "1-tied"),
    "FSDP2": Workload("fsdp", "three", strategy="classic"),
    "DDP": Workload("ddp", "three"),
    "Megatron": Workload("megatron", "three", strategy="classic"),
}
SECTIONS = ("kills", "survivors", "numbers", "files", "resumes", "mlflow")


def strikes(sections: list[str]) -> Iterator[tuple[str, str]]:
    """(section, workload) of what is asked for, in the table's order."""
    names = {"kills": WORKLOADS, "survivors": THREES, "numbers": SICK}
    for section in sections:
        for name in names.get(section, {"ZeRO 1": None}):
            yield section, name


def strike(section: str, name: str, families: str, progress: str) -> list[FaultResult]:
    """Runs one part in this process, and says each result as it comes."""
    base = Workload("zero", "1", families=families)
    # Another network, in all else alike.
    other = Workload("fsdp", "dp", {"accumulation": 1, "clip": 0.5}, families=families)
    found: list[FaultResult] = []
    with tempfile.TemporaryDirectory(prefix="clan-faults-", ignore_cleanup_errors=True) as place:
        folder = Path(place)
        parts = {
            "kills": lambda: kills.strike(WORKLOADS[name].of(families), name, list(WORKLOADS).index(name), folder),
            "survivors": lambda: survivors.strike(THREES[name].of(families), name, folder),
            "numbers": lambda: numbers.strike(SICK[name].of(families), name, folder),
            "files": lambda: damage.strike(base, name, folder),
            "resumes": lambda: resumes.strike(base, name, other, folder),
            "mlflow": lambda: trackers.strike(base, name, folder),
        }
        for result in parts[section]():
            found.append(result)
            if result.seconds or result.wrong:
                print(f"{progress} {result.line} ({result.seconds:.1f} s)", flush=True)
    return found
