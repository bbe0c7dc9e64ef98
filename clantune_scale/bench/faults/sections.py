"""The sections of the benchmark, and the engines that each one runs on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from clantune_scale.bench.faults import damage, kills, numbers, resumes, survivors, trackers
from clantune_scale.bench.faults.results import FaultResult
from clantune_scale.bench.faults.workload import Workload

#: Two members of two ranks. DDP has two members of one rank: from three ranks on, a restart regroups DDP's own sums.
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
#: Three members of one rank: two remain when one is lost.
THREES: dict[str, Workload] = {
    "ZeRO 1": Workload("zero", "1-three"),
    "FSDP2": Workload("fsdp", "three"),
    "DDP": Workload("ddp", "three"),
    "Megatron": Workload("megatron", "three"),
}
#: Workloads with non-finite numbers in a member of one rank or of two.
SICK: dict[str, Workload] = {
    "ZeRO 1": Workload("zero", "1-three"),
    "ZeRO 3": Workload("zero", "3", strategy="classic"),
    "pipeline": Workload("pipeline", "1-tied"),
    "FSDP2": Workload("fsdp", "three", strategy="classic"),
    "DDP": Workload("ddp", "three"),
    "Megatron": Workload("megatron", "three", strategy="classic"),
}
SECTIONS = ("kills", "survivors", "numbers", "files", "resumes", "mlflow")


def parts(sections: list[str]) -> Iterator[tuple[str, str]]:
    """The (section, workload) pairs of the requested sections, in the order of the table."""
    names = {"kills": WORKLOADS, "survivors": THREES, "numbers": SICK}
    for section in sections:
        for name in names.get(section, {"ZeRO 1": None}):
            yield section, name


def run_part(section: str, name: str, families: str, progress: str) -> list[FaultResult]:
    """Runs one part in this process and prints each result when it is known."""
    base = Workload("zero", "1", families=families)
    # The same set-up with another network.
    other = Workload("fsdp", "dp", {"accumulation": 1, "clip": 0.5}, families=families)
    found: list[FaultResult] = []
    with tempfile.TemporaryDirectory(prefix="clan-faults-", ignore_cleanup_errors=True) as place:
        folder = Path(place)
        runs = {
            "kills": lambda: kills.inject(WORKLOADS[name].of(families), name, list(WORKLOADS).index(name), folder),
            "survivors": lambda: survivors.inject(THREES[name].of(families), name, folder),
            "numbers": lambda: numbers.inject(SICK[name].of(families), name, folder),
            "files": lambda: damage.inject(base, name, folder),
            "resumes": lambda: resumes.inject(base, name, other, folder),
            "mlflow": lambda: trackers.inject(base, name, folder),
        }
        for result in runs[section]():
            found.append(result)
            if result.seconds or result.wrong:
                print(f"{progress} {result.line} ({result.seconds:.1f} s)", flush=True)
    return found
