"""The best that a fixed schedule can do: an exhaustive grid, picked on test loss, computed once and cached."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path

from clantune_scale.bench.batched import BatchedClans, Settings
from clantune_scale.bench.schedules import curves
from clantune_scale.bench.schedules.methods import FIXED
from clantune_scale.bench.schedules.problem import Problem, Start
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
#: How often two more rates are searched. Many rates may be equally good, and then the best one lies anywhere.
_MOST_EXTENSIONS = 3
#: Least progress of the oracle, as a share of the initial loss, without which there is nothing to measure.
LEAST_PROGRESS = 0.01


class NoOracleError(ConfigError):
    """A problem has no oracle to measure runs against."""


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
        """``factor`` times the best constant rate, lowered along ``rates`` to one that trains."""
        return self._lowered(
            factor * self.constant_rate, self.constant_rate, dict(zip(rates, self.constant_losses, strict=True))
        )

    def start_rate(self, start: Start, problem: Problem) -> float:
        """The learning rate of a start, lowered along the grid to one that trains with the problem's own schedule.

        Raises:
            ConfigError: if the start asks for the best peak of a schedule that the grid has not.
        """
        if start.anchor == "oracle":
            return start.rate * self.best.rate
        losses = self.losses_along(problem.schedule, problem.settings.weight_decay)
        if start.anchor == "tuned":
            if not losses:
                raise ConfigError(
                    f"start {start.name!r} of {problem.name!r} asks for the best peak of {problem.schedule!r}, which "
                    f"is not in the grid's {problem.grid.schedules}. Add it there."
                )
            best = min(losses, key=losses.__getitem__)
            return self._lowered(start.rate * best, best, losses)
        losses = losses or dict(zip(problem.grid.rates, self.constant_losses, strict=True))
        return self._lowered(start.rate * self.constant_rate, self.constant_rate, losses)

    def losses_along(self, schedule: str, weight_decay: float) -> dict[float, float]:
        """By learning rate, the losses of one schedule with one weight decay, as far as they were searched."""
        return {rate: loss for rate, *rest, loss in self.grid if rest == [schedule, weight_decay]}

    def _lowered(self, wanted: float, best: float, losses: Mapping[float, float]) -> float:
        """``wanted``, or the highest rate that trains below it.

        A learning rate trains if it makes a tenth of the progress that ``best`` makes. All below that are taken to
        train.
        """
        if wanted <= best:
            return wanted
        least = self.initial_loss - 0.1 * (self.initial_loss - losses.get(best, self.loss))
        trains = [rate for rate, loss in losses.items() if best <= rate and loss < least]
        highest = max(rate for rate in trains if rate <= 1.01 * wanted)
        is_between = highest < 0.98 * wanted and max(trains) > wanted
        return wanted if is_between else highest

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
    """Runs the grid, and the best point in shorter runs."""
    losses = _grid_losses(problem)
    best = min(losses, key=losses.__getitem__)
    own = problem.settings.weight_decay
    constant = [losses.get(Choice(rate, "constant", own), math.inf) for rate in problem.grid.rates]
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
        problem.grid.rates[constant.index(min(constant))],
        tuple(map(_rounded, constant)),
        by_share,
        tuple((point.rate, point.schedule, point.weight_decay, _rounded(losses[point])) for point in losses),
    )


def _grid_losses(problem: Problem) -> dict[Choice, float]:
    """By point of the grid, as far as it is searched, its mean test loss, in the grid's order."""
    grid = problem.grid
    first, end, last = 0, len(grid.rates), len(grid.rates) - 1
    if grid.reach is not None:
        coarse = [Choice(rate, "constant", problem.settings.weight_decay) for rate in grid.rates[::2]]
        found = fixed_losses(problem, coarse, GRID_SEEDS[:1])
        near = 2 * found.index(min(found))
        first, end = max(0, near - grid.reach[0]), min(end, near + grid.reach[1] + 1)
    losses = _losses_at(problem, grid.rates[first:end])
    for _ in range(_MOST_EXTENSIONS if grid.reach is not None else 0):
        # Every schedule's best rate has to lie inside, and so the one that starts are counted from.
        edges = {_best_of(losses, schedule).rate for schedule in grid.schedules}
        if first > 0 and grid.rates[first] in edges:
            begin = max(0, first - 2)
            losses = {**_losses_at(problem, grid.rates[begin:first]), **losses}
            first = begin
        elif end <= last and grid.rates[end - 1] in edges:
            stop = min(last + 1, end + 2)
            losses |= _losses_at(problem, grid.rates[end:stop])
            end = stop
        else:
            break
    return losses


def _best_of(losses: Mapping[Choice, float], schedule: str) -> Choice:
    along = [point for point in losses if point.schedule == schedule]
    return min(along, key=losses.__getitem__)


def _losses_at(problem: Problem, rates: Sequence[float]) -> dict[Choice, float]:
    """By point, the mean test losses of all points with these rates."""
    points = [Choice(*point) for point in itertools.product(rates, problem.grid.schedules, problem.grid.weight_decays)]
    return dict(zip(points, fixed_losses(problem, points, GRID_SEEDS), strict=True))


def oracle_runs(problem: Problem, oracle: Oracle, seeds: Sequence[int]) -> list[float]:
    """[seeds]: test losses of the best point of the grid that trains on these seeds as it did on the grid's.

    The best learning rate is often the last one before divergence. On other seeds, or another processor, it may
    diverge. Nobody would have chosen a point that loses a quarter of its progress on one seed, so the next best is
    taken.

    Raises:
        NoOracleError: if none of the best few does, or the best makes no progress.
    """
    if not oracle.initial_loss - oracle.loss > LEAST_PROGRESS * abs(oracle.initial_loss):
        raise NoOracleError(
            f"the oracle of {problem.name!r} goes from {oracle.initial_loss:.4g} to {oracle.loss:.4g} only. Give the "
            f"problem more steps, or a grid with other rates."
        )
    points = sorted(oracle.grid, key=lambda point: point[3])[:MOST_TRIED]
    for rate, schedule, weight_decay, loss in points:
        (runs,) = fixed_runs(problem, [Choice(rate, schedule, weight_decay)], seeds)
        if max(runs) < loss + EDGE * (oracle.initial_loss - loss):
            return runs
    raise NoOracleError(
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
