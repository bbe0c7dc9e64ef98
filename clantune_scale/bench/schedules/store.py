"""Finished trials on disk, so that a benchmark that was interrupted goes on where it was."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clantune_scale.bench.schedules.problem import Problem
from clantune_scale.bench.schedules.records import finite
from clantune_scale.bench.schedules.trial import Trial, TrialRun

_PACKAGE = Path(__file__).parents[2]
#: Sources that results depend on; a strategy from elsewhere is known by its name only.
_FOLDERS = ("core", "bench/batched", "bench/schedules/families", "bench/schedules/peers", "bench/schedules/problems")
_FILES = (
    "config/default_genes.py",
    "config/gene_catalogue.py",
    "data/sampler.py",
    *(f"bench/schedules/{name}.py" for name in ("curves", "methods", "oracle", "problem", "trial", "variants")),
)


class Store:
    """A folder of results.

    Args:
        folder: made if it is not there; None keeps nothing.
        reads: whether results that are there are used.
    """

    def __init__(self, folder: Path | None = None, *, reads: bool = True) -> None:
        self._folder, self._reads = folder, reads

    def trial(
        self, method: object, problem: Problem, rates: Sequence[float], seeds: Sequence[int], run: Callable[[], Trial]
    ) -> Trial:
        """A trial that is there, or the one that ``run`` gives."""
        if self._folder is None:
            return run()
        starts = [repr(start) for start in problem.starts]
        words = ("trial", repr(method), *_words(problem), *starts, *rates, *seeds)
        return _trial(self._kept(words, lambda: asdict(run())))

    def losses(
        self, what: str, problem: Problem, seeds: Sequence[int], run: Callable[[], Sequence[float]]
    ) -> list[float]:
        """[seeds] losses that are there, or those that ``run`` gives."""
        if self._folder is None:
            return list(run())
        found = self._kept((what, *_words(problem), *seeds), lambda: {"losses": list(run())})
        return [_number(loss) for loss in found["losses"]]

    def _kept(self, words: Sequence[object], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        assert self._folder is not None
        key = hashlib.blake2b(repr((code(), *words)).encode(), digest_size=12).hexdigest()
        path = self._folder / f"{key}.json"
        if self._reads and path.is_file():
            return json.loads(path.read_text())
        record = finite(run())
        self._folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(record))
        unfinished.replace(path)  # an interrupted write leaves no half a result
        return json.loads(json.dumps(record))


@functools.cache
def code() -> str:
    """A digest of the sources that decide results: another strategy's results are other results."""
    sources = hashlib.blake2b(digest_size=12)
    found = [path for folder in _FOLDERS for path in sorted((_PACKAGE / folder).rglob("*.py"))]
    for path in [*found, *(_PACKAGE / name for name in _FILES)]:
        sources.update(path.read_bytes())
    return sources.hexdigest()


def _words(problem: Problem) -> tuple[object, ...]:
    own = (problem.name, problem.fingerprint(), problem.schedule, problem.knows_length, problem.num_samples)
    return (*own, *problem.extra_genes)


def _trial(record: dict[str, Any]) -> Trial:
    runs = tuple(tuple(map(_run, of_start)) for of_start in record["runs"])
    return Trial(record["method"], record["problem"], runs, record["cpu_s"])


def _run(record: dict[str, Any]) -> TrialRun:
    return TrialRun(
        _number(record["loss"]),
        record["cost"],
        tuple((step, _number(rate)) for step, rate in record["rates"]),
        record["rollbacks"],
        tuple((step, _number(loss)) for step, loss in record["validation"]),
    )


def _number(read: float | None) -> float:
    return math.inf if read is None else read
