"""``python -m clantune_scale.bench.schedules``: the table, its JSON and its figures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from clantune_scale.bench.schedules.benchmark import REPORTING_SEEDS, TUNING_SEEDS, run
from clantune_scale.bench.schedules.methods import named, read_variants
from clantune_scale.bench.schedules.oracle import Oracle
from clantune_scale.bench.schedules.pictures import draw_rates
from clantune_scale.bench.schedules.problem import Problem
from clantune_scale.bench.schedules.suite import load
from clantune_scale.bench.schedules.trial import Trial
from clantune_scale.errors import ClanError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark. Returns 0, or 2 if a name or a file is wrong."""
    options = _parser().parse_args(arguments)
    # These models are small: a second thread costs more than it brings, and denormal numbers are slow.
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        _measure(options)
    except ClanError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _measure(options: argparse.Namespace) -> None:
    methods = named(options.methods, options.population, members=options.members)
    methods += [method for path in options.variants for method in read_variants(path)]
    seeds = REPORTING_SEEDS if options.report else TUNING_SEEDS[options.seeds]
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)

    def draw(trial: Trial, problem: Problem, oracle: Oracle) -> None:
        name = f"{trial.problem}--{trial.method}".replace(" ", "_").replace("/", "_")
        draw_rates(trial, problem, oracle, out / f"{name}.png")

    def say(line: str) -> None:
        print(line, flush=True)

    see = {"see": draw} if options.figures else {}
    result = run(load(options.problems), methods, seeds=seeds, say=say, **see)
    (out / "table.md").write_text(result.to_markdown())
    (out / "table.json").write_text(json.dumps(result.to_json()))
    print("\n" + result.to_markdown())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m clantune_scale.bench.schedules", description=__doc__)
    add = parser.add_argument
    add(
        "--problems",
        nargs="+",
        default=["study"],
        help="names, sets of them (study, small, kinds, all), or module:NAME",
    )
    add("--methods", nargs="*", default=["fixed", "warmup-linear", "clan"], help="baselines, strategies and peers")
    add("--population", type=int, default=8, help="members of the strategies' clans")
    add(
        "--members",
        choices=["groups", "line"],
        default="groups",
        help="whether all members train (groups) or one model stands for them (line); NAME-line sets it for one row",
    )
    add("--variants", nargs="*", type=Path, default=[], help="JSON files: row name to strategy, options, ...")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seeds", choices=sorted(TUNING_SEEDS), default="a", help="the tuning seeds to run on")
    which.add_argument("--report", action="store_true", help="run on the reporting seeds, and say so in the table")
    add("--out", type=Path, default=Path("schedule-benchmark"), help="folder of the table and the figures")
    add("--figures", action="store_true", help="draw every method's learning rates")
    return parser


if __name__ == "__main__":
    sys.exit(main())
