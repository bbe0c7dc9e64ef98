"""Problems x methods x seeds to one result."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from clantune_scale.bench.schedules.methods import FIXED, Method
from clantune_scale.bench.schedules.oracle import Oracle, oracle_of, oracle_runs
from clantune_scale.bench.schedules.peers.optimizers import OptimizerPeer
from clantune_scale.bench.schedules.problem import Problem
from clantune_scale.bench.schedules.scores import ReferenceLosses
from clantune_scale.bench.schedules.table import Result
from clantune_scale.bench.schedules.trial import Trial, run_trial

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
) -> Result:
    """Runs every method on every problem.

    Args:
        problems: the columns.
        methods: the rows.
        seeds: of weights, data and decisions, the same for all.
        say: gets a line for every trial.
        see: gets every method's trial, as soon as it is done.
    """
    references, by_problem = [], []
    for problem in problems:
        oracle = oracle_of(problem)
        rates = start_rates(problem, oracle)
        reference, default = reference_losses_of(problem, seeds)
        references.append(reference)
        trials = []
        for method in methods:
            is_default = method == FIXED
            trial = default if is_default else run_trial(method, problem, rates=rates, seeds=seeds)
            trials.append(trial)
            values = " ".join(f"{reference.s1(i, loss):6.2f}" for i, loss in enumerate(trial.losses))
            say(f"{problem.name:24s} {method.name:24s} S1 {values}   {trial.cpu_s:.2f} CPU s a run")
            see(trial, problem, oracle)
        by_problem.append(trials)
    is_report = tuple(seeds) == REPORTING_SEEDS
    by_method = tuple(tuple(trials[row] for trials in by_problem) for row in range(len(methods)))
    return Result(tuple(seeds), is_report, tuple(references), by_method)


def start_rates(problem: Problem, oracle: Oracle) -> list[float]:
    """[starts]: the learning rate that each is configured with."""
    return [oracle.trained_rate(start.rate, problem.grid.rates) for start in problem.starts]


def reference_losses_of(problem: Problem, seeds: Sequence[int]) -> tuple[ReferenceLosses, Trial]:
    """What runs with these seeds are measured against, and the starts' own runs."""
    oracle = oracle_of(problem)
    default = run_trial(FIXED, problem, rates=start_rates(problem, oracle), seeds=seeds)
    runs = oracle_runs(problem, oracle, seeds)
    reference = ReferenceLosses(
        problem=problem.name,
        starts=tuple(start.name for start in problem.starts),
        default_losses=tuple(default.losses),
        oracle_loss=statistics.fmean(runs),
        initial_loss=oracle.initial_loss,
        losses_by_share=oracle.losses_by_share,
        default_runs=tuple(tuple(run.loss for run in runs) for runs in default.runs),
        oracle_runs=tuple(runs),
    )
    return reference, default
