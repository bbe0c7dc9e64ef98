"""``python -m clantune_scale.bench.schedules.ceiling``: how far one learning rate gets, chosen with hindsight.

For each start it finds the single learning rate with the best test loss, on the seeds that score it. Everything else
stays as the start has it, under the start's own schedule and under warm-up and linear decay. A method that moves only
learning rates and cannot look ahead should not do better. One that moves other genes, or averages weights, may.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from clantune_scale.bench.schedules.benchmark import REPORTING_SEEDS, TUNING_SEEDS, reference_losses_of, settled
from clantune_scale.bench.schedules.methods import FIXED
from clantune_scale.bench.schedules.oracle import oracle_of
from clantune_scale.bench.schedules.problem import Problem
from clantune_scale.bench.schedules.suite import load
from clantune_scale.bench.schedules.trial import run_trial
from clantune_scale.errors import ClanError

#: Learning rates that are tried, in octaves from the oracle's.
OCTAVES = tuple(half / 2 for half in range(-10, 3))


@dataclass(frozen=True)
class Ceiling:
    """What the best single learning rate reaches from a start.

    Attributes:
        s1: its score.
        rate: the learning rate, the peak of its curve.
        schedule: the curve's name.
    """

    s1: float
    rate: float
    schedule: str


def ceilings(problem: Problem, seeds: Sequence[int]) -> list[Ceiling]:
    """[starts]: what the best single learning rate reaches from each.

    Args:
        problem: whose starts they are.
        seeds: of weights and data; the learning rate is chosen by the test loss on these, and scored on them.
    """
    oracle = oracle_of(problem)
    problem = settled(problem, oracle)
    reference, _ = reference_losses_of(problem, seeds)
    # The learning rate is replaced here, so starts that differ only in it are one.
    kinds = list({repr(start.changes): start for start in problem.starts}.values())
    found: dict[str, list[tuple[float, float, str]]] = {repr(start.changes): [] for start in kinds}
    for schedule in dict.fromkeys((problem.schedule, "warmup-linear")):
        varied = problem.variant(problem.name, schedule=schedule, starts=kinds)
        for rate in (oracle.best.rate * 2**octaves for octaves in OCTAVES):
            trial = run_trial(FIXED, varied, rates=[rate] * len(kinds), seeds=seeds)
            for start, runs in zip(kinds, trial.runs, strict=True):
                found[repr(start.changes)].append((statistics.fmean(run.loss for run in runs), rate, schedule))
    best = [min(found[repr(start.changes)]) for start in problem.starts]
    return [Ceiling(reference.s1(i, loss), rate, schedule) for i, (loss, rate, schedule) in enumerate(best)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line per problem. Returns 0, or 2 if a name is wrong."""
    parser = argparse.ArgumentParser(prog="python -m clantune_scale.bench.schedules.ceiling", description=__doc__)
    parser.add_argument("--problems", nargs="+", default=["study"], help="as for the benchmark")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seeds", choices=sorted(TUNING_SEEDS), default="a", help="tuning seeds")
    which.add_argument("--report", action="store_true", help="the reporting seeds: nothing may be chosen by them")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    seeds = REPORTING_SEEDS if options.report else TUNING_SEEDS[options.seeds]
    try:
        for problem in load(options.problems):
            of_starts = zip(problem.starts, ceilings(problem, seeds), strict=True)
            said = [f"{start.name} {c.s1:.2f} ({c.schedule} from {c.rate:.2g})" for start, c in of_starts]
            print(f"{problem.name}: {'; '.join(said)}", flush=True)
    except ClanError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
