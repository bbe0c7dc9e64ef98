"""How much of the oracle's progress is missing at the end of a run: as configured, and with a method.

S1 says nothing about a start that is already good. The share that is missing says it about every start.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from clantune_scale.bench.schedules.noise import ERRORS, standard_error
from clantune_scale.bench.schedules.scores import SOLVED, ReferenceLosses
from clantune_scale.bench.schedules.trial import Trial, TrialRun

#: Most that a run may miss: training that gained nothing. What diverged does not decide a mean.
MOST = 1.0
#: Share of the progress beyond which, and beyond noise, a start counts as worse or better than configured.
COUNTS = 0.005


@dataclass(frozen=True)
class StartFigures:
    """A method from one start of one problem.

    Attributes:
        problem, start, kind: their names.
        configured: [seeds] share of the oracle's progress that the start kept as it is misses.
        missing: [seeds] share that is missing with the method.
        s1: see ``ReferenceLosses.s1``.
        has_room: whether S1 is more than a ratio of noises.
        excess: how far the mean loss is above the oracle's, as a share of the oracle's.
        cost: in plain runs.
        reached: [seeds] share of the run after which the validation loss is down for good at what the start kept as it
            is ends with, or 0.5 % of the progress above; infinite if it does not end there, empty if nothing is
            evaluated on the way.
    """

    problem: str
    start: str
    kind: str
    configured: tuple[float, ...]
    missing: tuple[float, ...]
    s1: float
    has_room: bool
    excess: float
    cost: float
    reached: tuple[float, ...]

    @property
    def harms(self) -> list[float]:
        """[seeds]: what is missing more than as configured."""
        return [mine - own for mine, own in zip(self.missing, self.configured, strict=True)]

    @property
    def sign(self) -> int:
        """1 if the method is worse than the start kept as it is, -1 if it is better, 0 if nobody can say."""
        harm, error = statistics.fmean(self.harms), standard_error(self.harms)
        is_clear = abs(harm) > COUNTS and not abs(harm) <= ERRORS * error
        return int(math.copysign(is_clear, harm))


def figures_of(trial: Trial, reference: ReferenceLosses) -> list[StartFigures]:
    """[starts]: the figures of one method on one problem."""
    found, slack = [], COUNTS * (reference.initial_loss - reference.oracle_loss)
    for start, runs in enumerate(trial.runs):
        loss = statistics.fmean(run.loss for run in runs)
        ends = reference.default_validation[start] if reference.default_validation else ()
        oracle = reference.oracle_loss
        found.append(
            StartFigures(
                reference.problem,
                reference.starts[start],
                reference.kinds[start] if reference.kinds else "wild",
                _missing(reference, start, reference.default_runs[start]),
                _missing(reference, start, [run.loss for run in runs]),
                reference.s1(start, loss),
                reference.has_room(start),
                (loss - oracle) / abs(oracle) if oracle else math.inf,
                statistics.fmean(run.cost for run in runs),
                tuple(_reached(run, end + slack) for run, end in zip(runs, ends, strict=False) if run.validation),
            )
        )
    return found


def _missing(reference: ReferenceLosses, start: int, losses: Sequence[float]) -> tuple[float, ...]:
    """[seeds]; each counted against the oracle's own run with that seed, over its mean progress."""
    progress = reference.initial_loss - reference.oracle_loss
    pairs = zip(losses, reference.oracle_runs, strict=True)
    return tuple(min(MOST, (loss - best) / progress) for loss, best in pairs)


def _reached(run: TrialRun, end: float) -> float:
    total, since = run.validation[-1][0], math.inf
    for step, loss in reversed(run.validation):
        if loss > end:
            break
        since = step / total
    return since


@dataclass(frozen=True)
class KindFigures:
    """A method over all starts of one kind. Shares are of the oracle's progress.

    Attributes:
        kind: of the starts; ``"all"`` for all of them.
        num_starts, num_problems: how many there are.
        configured, missing: means over starts and seeds.
        harm: their difference.
        seed_error: of the harm, over seeds: the mean over starts is taken seed by seed.
        problem_error: of the harm, over problems: what another draw of problems would change.
        num_worse, num_better: starts that differ from what was configured by more than noise.
        num_solved, num_with_room: of S1, among the starts that have room.
        excess: median over starts.
        cost: mean over starts.
        reached: median over starts and seeds.
        never: share of them that do not end there.
    """

    kind: str
    num_starts: int
    num_problems: int
    configured: float
    missing: float
    harm: float
    seed_error: float
    problem_error: float
    num_worse: int
    num_better: int
    num_solved: int
    num_with_room: int
    excess: float
    cost: float
    reached: float
    never: float

    @classmethod
    def of(cls, kind: str, figures: Sequence[StartFigures]) -> KindFigures:
        """What a method's figures say of one kind together."""
        by_seed = [statistics.fmean(harms) for harms in zip(*(own.harms for own in figures), strict=True)]
        by_problem: dict[str, list[float]] = {}
        for own in figures:
            by_problem.setdefault(own.problem, []).append(statistics.fmean(own.harms))
        reached = [share for own in figures for share in own.reached]
        room = [own for own in figures if own.has_room]
        return cls(
            kind,
            len(figures),
            len(by_problem),
            _mean(own.configured for own in figures),
            _mean(own.missing for own in figures),
            statistics.fmean(by_seed),
            standard_error(by_seed),
            standard_error([statistics.fmean(harms) for harms in by_problem.values()]),
            sum(own.sign > 0 for own in figures),
            sum(own.sign < 0 for own in figures),
            sum(own.s1 >= SOLVED for own in room),
            len(room),
            statistics.median(own.excess for own in figures),
            statistics.fmean(own.cost for own in figures),
            statistics.median(reached) if reached else math.nan,
            statistics.fmean(math.isinf(share) for share in reached) if reached else math.nan,
        )


def by_kind(figures: Sequence[StartFigures]) -> list[KindFigures]:
    """[kinds, in the order in which they come first] and, if there are several, all together."""
    groups: dict[str, list[StartFigures]] = {}
    for own in figures:
        groups.setdefault(own.kind, []).append(own)
    found = [KindFigures.of(kind, group) for kind, group in groups.items()]
    return found + ([KindFigures.of("all", figures)] if len(groups) > 1 else [])


def _mean(of_starts: Iterable[Sequence[float]]) -> float:
    return statistics.fmean(statistics.fmean(seeds) for seeds in of_starts)


COLUMNS = (
    "starts",
    "method",
    "number",
    "missing as configured, %",
    "missing, %",
    "harm, % (± over seeds, over problems)",
    "worse, better",
    "solved of those with room",
    "excess loss, %",
    "cost",
    "down at what was configured after",
)


def rows(methods: Mapping[str, Sequence[StartFigures]]) -> list[list[str]]:
    """The table's rows, grouped by kind of start.

    Args:
        methods: by name, the figures from all starts of all problems.
    """
    by_method = {name: {own.kind: own for own in by_kind(figures)} for name, figures in methods.items()}
    kinds = dict.fromkeys(kind for kinds in by_method.values() for kind in kinds)
    return [_row(name, found[kind]) for kind in kinds for name, found in by_method.items() if kind in found]


def rows_by_problem(methods: Mapping[str, Sequence[StartFigures]]) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): what is missing by problem and kind of start, as configured and then with each method.

    Args:
        methods: by name, the figures from all starts of all problems.
    """
    first = next(iter(methods.values()))
    kinds = list(dict.fromkeys(own.kind for own in first))
    cells: dict[str, dict[str, str]] = {own.problem: dict.fromkeys(kinds, "") for own in first}
    for problem, kind in dict.fromkeys((own.problem, own.kind) for own in first):
        groups = [[own for own in all_ if (own.problem, own.kind) == (problem, kind)] for all_ in methods.values()]
        shares = [_mean(own.configured for own in groups[0]), *(_mean(o.missing for o in group) for group in groups)]
        cells[problem][kind] = " ".join(map(_percent, shares))
    return ["missing, %", *kinds], [[problem, *own.values()] for problem, own in cells.items()]


def _row(method: str, own: KindFigures) -> list[str]:
    never = f" (never: {_percent(own.never, 0)} %)" if own.never > 0 else ""
    return [
        own.kind,
        method,
        f"{own.num_starts} of {own.num_problems}",
        _percent(own.configured),
        _percent(own.missing),
        f"{_percent(own.harm, sign='+')} (± {_percent(own.seed_error)}, {_percent(own.problem_error)})",
        f"{own.num_worse}, {own.num_better}",
        f"{own.num_solved} of {own.num_with_room}",
        _percent(own.excess),
        f"{own.cost:.2f}",
        (f"{own.reached:.2f} of the run" if math.isfinite(own.reached) else "-") + never,
    ]


def _percent(share: float, digits: int = 1, sign: str = "") -> str:
    return f"{100 * share:{sign}.{digits}f}" if math.isfinite(share) else "-"
