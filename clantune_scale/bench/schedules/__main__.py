"""``python -m clantune_scale.bench.schedules``: the tables, their JSON and their figures."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from clantune_scale.bench.schedules import reports
from clantune_scale.bench.schedules.benchmark import REPORTING_SEEDS, TUNING_SEEDS, run
from clantune_scale.bench.schedules.families.generator import Families, draw_problem
from clantune_scale.bench.schedules.families.split import sides
from clantune_scale.bench.schedules.methods import named, read_variants
from clantune_scale.bench.schedules.oracle import Oracle
from clantune_scale.bench.schedules.pictures import draw_missing, draw_rates
from clantune_scale.bench.schedules.problem import Problem
from clantune_scale.bench.schedules.store import Store
from clantune_scale.bench.schedules.suite import GENERATED, load
from clantune_scale.bench.schedules.trial import Trial
from clantune_scale.errors import ClanError, ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark. Returns 0, or 2 if a name or a file is wrong, or if something is held back."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(arguments)
    # These models are small: a second thread costs more than it brings, and denormal numbers are slow.
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        for module in options.plugins:
            importlib.import_module(module)
        if options.list_families:
            _list_families()
        elif options.show is not None:
            _show(options.show, report=options.report)
        else:
            _measure(options, arguments)
    except (ClanError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _measure(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    methods = named(options.methods, options.population, members=options.members)
    methods += [method for path in options.variants for method in read_variants(path)]
    problems = _problems(options)
    seeds = REPORTING_SEEDS if options.report else TUNING_SEEDS[options.seeds]
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)

    def draw(trial: Trial, problem: Problem, oracle: Oracle) -> None:
        name = re.sub(r"[^\w.,%=-]+", "_", f"{trial.problem}--{trial.method}")
        draw_rates(trial, problem, oracle, out / f"{name}.png")

    def say(line: str) -> None:
        print(line, flush=True)

    see = {"see": draw} if options.figures else {}
    if options.report:  # before it runs: whoever looks has looked, even if it is interrupted
        reports.append(arguments)
    result = run(problems, methods, seeds=seeds, say=say, store=Store(out / "runs", reads=options.resume), **see)
    (out / "table.md").write_text(result.to_markdown())
    (out / "table.json").write_text(json.dumps(result.to_json()))
    if options.figures:
        draw_missing(result.figures, out / "missing.png")
    print("\n" + result.to_markdown())


def _problems(options: argparse.Namespace) -> list[Problem]:
    """Those that are named, and those that are drawn in the place of ``generated``."""
    problems: list[Problem] = []
    for name in options.problems:
        if name != GENERATED:
            problems += load([name])
            continue
        families = Families.of(
            report=options.report, tasks=options.tasks, optimizers=options.optimizers, schedules=options.schedules
        )
        indices = options.only or range(options.draw)
        problems += [draw_problem(families, seed=options.draw_seed, index=index) for index in indices]
    return problems


def _list_families() -> None:
    for name, side in sides().items():
        print(f"{side:10s} {name}")


def _show(folder: Path, *, report: bool) -> None:
    """Prints a table that is there.

    Raises:
        ConfigError: if it is a report and ``report`` is not set, or if there is none.
    """
    record = folder / "table.json"
    if not record.is_file():
        raise ConfigError(f"there is no {record}. Name the folder that a benchmark wrote with --out.")
    if json.loads(record.read_text())["is_report"] and not report:
        raise ConfigError(f"{record} is a report. Add --report to see it; nothing may be tuned by it.")
    print((folder / "table.md").read_text())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m clantune_scale.bench.schedules", description=__doc__)
    add = parser.add_argument
    add(
        "--problems",
        nargs="+",
        default=["study"],
        help="names, sets of them (study, small, kinds, all), generated, or module:NAME",
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
    which.add_argument(
        "--report",
        action="store_true",
        help="run on the reporting seeds, draw from the reporting side of the split, and log the report",
    )
    add("--out", type=Path, default=Path("schedule-benchmark"), help="folder of the tables, figures and finished runs")
    add("--resume", action="store_true", help="use what finished runs --out has from the same code")
    add("--figures", action="store_true", help="draw every method's learning rates, and what is missing")
    add("--show", type=Path, metavar="FOLDER", help="print the tables that a benchmark wrote, and run nothing")
    _add_draw(parser)
    return parser


def _add_draw(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("generated problems").add_argument
    add("--draw", type=int, default=12, metavar="N", help="how many to draw")
    add("--draw-seed", type=int, default=0, metavar="S", help="of the draw")
    add("--only", type=int, nargs="*", default=[], metavar="I", help="these problems of the draw, from 0")
    for kind in ("tasks", "optimizers", "schedules"):
        add(f"--{kind}", nargs="*", default=[], metavar="FAMILY", help=f"draw only from these families of {kind}")
    add("--plugins", nargs="*", default=[], metavar="MODULE", help="modules to import that register families")
    add("--list-families", action="store_true", help="print all families with their side of the split, and run nothing")


if __name__ == "__main__":
    sys.exit(main())
