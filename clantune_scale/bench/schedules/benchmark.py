"""Problems x methods x seeds to one result."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from clantune_scale.bench.schedules.methods import FIXED, Method
from clantune_scale.bench.schedules.oracle import NoOracleError, Oracle, oracle_of, oracle_runs
from clantune_scale.bench.schedules.peers.optimizers import OptimizerPeer
from clantune_scale.bench.schedules.problem import Problem, Start
from clantune_scale.bench.schedules.scores import ReferenceLosses
from clantune_scale.bench.schedules.store import Store
from clantune_scale.bench.schedules.table import Result
from clantune_scale.bench.schedules.trial import Trial, TrialRun, run_trial
from clantune_scale.errors import ConfigError

#: Sets of seeds to tune on; what wins on one must win on the others.
TUNING_SEEDS = {"a": (0, 1, 2), "b": (10, 11, 12), "c": (20, 21, 22), "d": (30, 31, 32)}
#: Seeds that nothing is ever tuned on.
REPORTING_SEEDS = (100, 101, 102)


def run(
    problems: Sequence[Problem],
    methods: Sequence[Method | OptimizerPeer],
    *,
    seeds: Sequence[int],
    say: Callable[[str], object] = print,
    see: Callable[[Trial, Problem, Oracle], object] = lambda *_: None,
    store: Store | None = None,
) -> Result:
    """Runs every method on every problem. A problem that has no oracle is left out, and the result says so.

    Args:
        problems: the columns.
        methods: the rows.
        seeds: of weights, data and decisions, the same for all.
        say: gets a line for every problem and every trial.
        see: gets every method's trial, as soon as it is done.
        store: has what was run before, and keeps what is run.

    Raises:
        ConfigError: if a problem is for reports only and these are no reporting seeds, or if no problem has an oracle.
    """
    check_side(problems, seeds)
    store, references, by_problem, left_out = store or Store(), [], [], []
    began = time.monotonic()
    for number, plain in enumerate(problems, 1):
        say(f"[{number}/{len(problems)}, {time.monotonic() - began:.0f} s] {plain.name}")
        oracle = oracle_of(plain)
        problem = settled(plain, oracle)
        try:
            reference, default = reference_losses_of(problem, seeds, store=store)
        except NoOracleError as error:
            say(f"left out: {error}")
            left_out.append(str(error))
            continue
        rates = start_rates(problem, oracle)
        references.append(reference)
        trials = []
        for method in methods:
            trial = default if method == FIXED else _trial(method, problem, rates, seeds, store)
            trials.append(trial)
            values = " ".join(f"{reference.s1(i, loss):6.2f}" for i, loss in enumerate(trial.losses))
            say(f"{problem.name.partition(';')[0]:24s} {method.name:24s} S1 {values}   {trial.cpu_s:.2f} CPU s a run")
            see(trial, problem, oracle)
        by_problem.append(trials)
    if not references:
        raise ConfigError(f"no problem is left: {' '.join(left_out)}")
    is_report = tuple(seeds) == REPORTING_SEEDS
    by_method = tuple(tuple(trials[row] for trials in by_problem) for row in range(len(methods)))
    return Result(tuple(seeds), is_report, tuple(references), by_method, tuple(left_out))


def check_side(problems: Sequence[Problem], seeds: Sequence[int]) -> None:
    """Refuses problems that are only for reports, unless the seeds are those of a report.

    Raises:
        ConfigError: for the first of them.
    """
    for problem in problems:
        if problem.is_reporting and tuple(seeds) != REPORTING_SEEDS:
            raise ConfigError(
                f"problem {problem.name!r} is on the reporting side of the split. Nothing may be tuned on it. "
                f"Add --report if this is a report; it is written to the log of reports."
            )


def _trial(
    method: Method | OptimizerPeer, problem: Problem, rates: Sequence[float], seeds: Sequence[int], store: Store
) -> Trial:
    return store.trial(method, problem, rates, seeds, lambda: run_trial(method, problem, rates=rates, seeds=seeds))


def start_rates(problem: Problem, oracle: Oracle) -> list[float]:
    """[starts]: the learning rate that each is configured with."""
    return [oracle.start_rate(start, problem) for start in problem.starts]


def settled(problem: Problem, oracle: Oracle) -> Problem:
    """``problem`` with the oracle's schedule and weight decay in the starts that are to have them."""

    def own(start: Start) -> Start:
        if start.anchor != "oracle":
            return start
        changes = {**start.changes, "weight_decay": oracle.best.weight_decay}
        return replace(start, changes=changes, schedule=oracle.best.schedule)

    return problem.variant(problem.name, starts=tuple(map(own, problem.starts)))


def reference_losses_of(
    problem: Problem, seeds: Sequence[int], *, store: Store | None = None
) -> tuple[ReferenceLosses, Trial]:
    """What runs with these seeds are measured against, and the starts' own runs.

    Args:
        problem: with its starts as :func:`settled` leaves them.
        seeds: of the runs.
        store: has what was run before, and keeps what is run.

    Raises:
        NoOracleError: if there is nothing to measure against.
        ConfigError: if the problem is for reports only and the seeds are not.
    """
    check_side([problem], seeds)
    store, oracle = store or Store(), oracle_of(problem)
    runs = store.losses("oracle", problem, seeds, lambda: oracle_runs(problem, oracle, seeds))
    default = _trial(FIXED, problem, start_rates(problem, oracle), seeds, store)
    reference = ReferenceLosses(
        problem=problem.name,
        starts=tuple(start.name for start in problem.starts),
        default_losses=tuple(default.losses),
        oracle_loss=statistics.fmean(runs),
        initial_loss=oracle.initial_loss,
        losses_by_share=oracle.losses_by_share,
        default_runs=tuple(tuple(run.loss for run in runs) for runs in default.runs),
        oracle_runs=tuple(runs),
        kinds=tuple(start.kind for start in problem.starts),
        default_validation=tuple(tuple(_end(run) for run in runs) for runs in default.runs),
    )
    return reference, default


def _end(run: TrialRun) -> float:
    """The validation loss at the end of a run; infinite if it diverged."""
    return run.validation[-1][1] if run.validation else math.inf
