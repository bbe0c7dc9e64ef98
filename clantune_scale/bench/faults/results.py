"""What came of each fault, and the table of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class FaultResult:
    """One fault.

    Attributes:
        what: the kind of fault: a row of the table, with ``where``.
        where: what it struck.
        fault: which one it was.
        wrong: what was not as it should be; empty where all was.
        seconds: that it took, the resume included.
    """

    what: str
    where: str
    fault: str
    wrong: str = ""
    seconds: float = 0.0

    @property
    def line(self) -> str:
        return f"{'WRONG' if self.wrong else 'right'}  {self.what} | {self.where} | {self.fault}  {self.wrong}".rstrip()


def table(results: Iterable[FaultResult]) -> str:
    """Markdown: kinds of faults, what they struck, how many of them, and how many came out right."""
    rows: dict[str, list[FaultResult]] = {}
    for result in results:
        rows.setdefault(result.what, []).append(result)
    lines = ["| what strikes | where | times | right |", "| --- | --- | --- | --- |"]
    for what, found in rows.items():
        where = ", ".join(dict.fromkeys(result.where for result in found))
        lines.append(f"| {what} | {where} | {len(found):,} | {sum(not result.wrong for result in found):,} |")
    return "\n".join(lines)


def write(path: Path, results: Iterable[FaultResult]) -> None:
    """All of them, one JSON object a line."""
    path.write_text("".join(json.dumps(asdict(result)) + "\n" for result in results))


def read(path: Path) -> list[FaultResult]:
    return [FaultResult(**json.loads(line)) for line in path.read_text().splitlines()]
