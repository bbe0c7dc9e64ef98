"""The result of each fault, and the table of results."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class FaultResult:
    """One fault.

    Attributes:
        what: the kind of fault, one row of the table.
        where: the workload that it was injected into.
        fault: which fault of that kind.
        wrong: the first check that failed; empty if all passed.
        seconds: duration, including the resume.
    """

    what: str
    where: str
    fault: str
    wrong: str = ""
    seconds: float = 0.0

    @property
    def line(self) -> str:
        return (
            f"{'FAILED' if self.wrong else 'passed'}  {self.what} | {self.where} | {self.fault}  {self.wrong}".rstrip()
        )


def table(results: Iterable[FaultResult]) -> str:
    """Markdown: kinds of faults, workloads, faults injected and faults passed."""
    rows: dict[str, list[FaultResult]] = {}
    for result in results:
        rows.setdefault(result.what, []).append(result)
    lines = ["| fault | workloads | injected | passed |", "| --- | --- | --- | --- |"]
    for what, found in rows.items():
        where = ", ".join(dict.fromkeys(result.where for result in found))
        lines.append(f"| {what} | {where} | {len(found):,} | {sum(not result.wrong for result in found):,} |")
    return "\n".join(lines)


def write(path: Path, results: Iterable[FaultResult]) -> None:
    """Writes one JSON object per line."""
    path.write_text("".join(json.dumps(asdict(result)) + "\n" for result in results))


def read(path: Path) -> list[FaultResult]:
    return [FaultResult(**json.loads(line)) for line in path.read_text().splitlines()]
