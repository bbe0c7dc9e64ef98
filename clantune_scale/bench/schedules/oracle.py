"""The best that a fixed schedule can do: an exhaustive grid, picked on test loss, computed once and cached."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path

from clantune_scale.bench.batched import BatchedClans, Settings
from clantune_scale.bench.schedules import curves
from clantune_scale.bench.schedules.methods import FIXED
from clantune_scale.bench.schedules.problem import Problem
from clantune_scale.bench.schedules.records import finite
from clantune_scale.bench.schedules.trial import champion_losses
from clantune_scale.errors import ConfigError

#: Seeds that the grid is searched with; no run of any method has them.
GRID_SEEDS = (1000, 1001)
#: Shares of a run in which the oracle's schedule is tried as well, for step efficiency.
SHARES = (0.5, 0.65, 0.8, 0.9)
#: Share of its progress that the grid's best point may lose on another seed, and how many points are tried at most.
EDGE, MOST_TRIED = 0.25, 10
#: Learning rates tried around the oracle's in a shorter run.
_SHORTER_RATES = (0.56, 1.0, 1.78)
_ROWS = 192


@dataclass(frozen=True)
class Choice:
    """A point of the grid."""

    rate: float
    schedule: str
    weight_decay: float


@dataclass(frozen=True)
class Oracle:
    """What the grid says of a problem.

    Attributes:
        problem: its name at the time of the search.
        best: the point with the lowest mean test loss.
        loss: of that point.
        initial_loss: test loss before training.
        constant_rate: the best constant learning rate with the problem's own weight decay, picked on test loss.
        constant_losses: by rate of the grid, with that weight decay.
        losses_by_share: test loss of the oracle's schedule in a part of the run, by its share.
        grid: by point, its mean test loss; infinite if training diverged.
    """

    problem: str
    best: Choice
    loss: float
    initial_loss: float
    constant_rate: float
    constant_losses: tuple[float, ...]
    losses_by_share: dict[float, float]
    grid: tuple[tuple[float, str, float, float], ...]

    def trained_rate(self, factor: float, rates: Sequence[float]) -> float:
        """``factor`` times the best constant rate, lowered along ``rates`` to one that trains.

        A learning rate trains if it takes away a tenth of the initial loss. All below the best one are taken to train.
        """
        wanted = factor * self.constant_rate
        if factor <= 1:
            return wanted
        trains = [
            rate
            for rate, loss in zip(rates, self.constant_losses, strict=True)
            if self.constant_rate <= rate <= wanted * 1.01 and loss < 0.9 * self.initial_loss
        ]
        return max(trains)

    def to_json(self) -> dict:
        """Plain data; null for runs that diverged."""
        return finite(asdict(self))

    @classmethod
    def from_json(cls, record: dict) -> Oracle:
        """The oracle that :meth:`to_json` wrote."""
        changes = {
            "best": Choice(**record["best"]),
            "constant_losses": tuple(map(_loss, record["constant_losses"])),
            "losses_by_share": {float(share): _loss(loss) for share, loss in record["losses_by_share"].items()},
            "grid": tuple((*point, _loss(loss)) for *point, loss in record["grid"]),
        }
        return cls(**{**record, **changes})


def oracle_of(problem: Problem, *, computes: bool = True) -> Oracle:
    """The problem's oracle: from the package, from the user's cache, or computed and cached.

    Raises:
        ConfigError: if it is cached nowhere and ``computes`` is false.
    """
    name = f"{problem.fingerprint()}.json"
    bundled = resources.files("clantune_scale.bench.schedules") / "oracles" / name
    cached = cache_folder() / name
    for place in (bundled, cached):
        if place.is_file():
            return Oracle.from_json(json.loads(place.read_text()))
    if not computes:
        raise ConfigError(
            f"problem {problem.name!r} has no oracle yet, neither in the package nor in {cached.parent}. "
            f"Run the benchmark on it once."
        )
    oracle = search(problem)
    cached.parent.mkdir(parents=True, exist_ok=True)
    cached.write_text(json.dumps(oracle.to_json()))
    return oracle


def cache_folder() -> Path:
    """Where computed oracles are kept: ``clantune_scale/oracles`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "clantune_scale" / "oracles"


def search(problem: Problem) -> Oracle:
    """Runs the whole grid, and the best point in shorter runs."""
    grid = problem.grid
    points = [Choice(*point) for point in itertools.product(grid.rates, grid.schedules, grid.weight_decays)]
    losses = dict(zip(points, fixed_losses(problem, points, GRID_SEEDS), strict=True))
    best = min(points, key=losses.__getitem__)
    own = problem.settings.weight_decay
    constant = [losses[Choice(rate, "constant", own)] for rate in grid.rates]
    by_share = {}
    for share in SHARES:
        shorter = problem.variant(problem.name, total_steps=round(share * problem.total_steps))
        near = [replace(best, rate=factor * best.rate) for factor in _SHORTER_RATES]
        by_share[share] = _rounded(min(fixed_losses(shorter, near, GRID_SEEDS)))
    return Oracle(
        problem.name,
        best,
        _rounded(losses[best]),
        _rounded(initial_loss(problem)),
        grid.rates[constant.index(min(constant))],
        tuple(map(_rounded, constant)),
        by_share,
        tuple((point.rate, point.schedule, point.weight_decay, _rounded(losses[point])) for point in points),
    )


def oracle_runs(problem: Problem, oracle: Oracle, seeds: Sequence[int]) -> list[float]:
    """[seeds]: test losses of the best point of the grid that trains on these seeds as it did on the grid's.

    The best learning rate is often the last one before divergence. On other seeds, or another processor, it may
    diverge. Nobody would have chosen a point that loses a quarter of its progress on one seed, so the next best is
    taken.

    Raises:
        ConfigError: if none of the best few does.
    """
    points = sorted(oracle.grid, key=lambda point: point[3])[:MOST_TRIED]
    for rate, schedule, weight_decay, loss in points:
        (runs,) = fixed_runs(problem, [Choice(rate, schedule, weight_decay)], seeds)
        if max(runs) < loss + EDGE * (oracle.initial_loss - loss):
            return runs
    raise ConfigError(
        f"none of the {len(points)} best points of {problem.name!r}'s grid trains on seeds {list(seeds)} as it did on "
        f"{list(GRID_SEEDS)}. Give the problem data or a batch with less noise, or a grid with lower rates."
    )


def fixed_losses(problem: Problem, points: Sequence[Choice], seeds: Sequence[int]) -> list[float]:
    """[points]: mean test loss over ``seeds`` of plain runs; infinite if one diverged."""
    return [statistics.fmean(losses) for losses in fixed_runs(problem, points, seeds)]


def fixed_runs(problem: Problem, points: Sequence[Choice], seeds: Sequence[int]) -> list[list[float]]:
    """[points][seeds]: test losses of plain runs; infinite if one diverged."""
    losses: list[float] = []
    size = max(1, _ROWS // len(seeds))
    for first in range(0, len(points), size):
        settings = [_settings(problem, point) for point in points[first : first + size] for _ in seeds]
        rows = list(seeds) * (len(settings) // len(seeds))
        strategies = [FIXED.build(problem, own, seed) for own, seed in zip(settings, rows, strict=True)]
        clans = BatchedClans(problem, strategies=strategies, settings=settings, seeds=rows)
        clans.run(problem.total_steps)
        losses += champion_losses(clans, problem)
    return [losses[i : i + len(seeds)] for i in range(0, len(losses), len(seeds))]


def initial_loss(problem: Problem) -> float:
    """Mean test loss of models that were not trained."""
    settings = [problem.settings] * len(GRID_SEEDS)
    strategies = [FIXED.build(problem, problem.settings, seed) for seed in GRID_SEEDS]
    clans = BatchedClans(problem, strategies=strategies, settings=settings, seeds=GRID_SEEDS)
    return statistics.fmean(champion_losses(clans, problem))


def _settings(problem: Problem, point: Choice) -> Settings:
    schedule = curves.over(point.schedule, problem.total_steps)
    return replace(problem.settings, lr=point.rate, weight_decay=point.weight_decay, schedule=schedule)


def _rounded(loss: float) -> float:
    return float(f"{loss:.6g}")


def _loss(read: float | None) -> float:
    return math.inf if read is None else read
