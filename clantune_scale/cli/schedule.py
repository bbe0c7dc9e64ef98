"""``clantune schedule``: the champion's ancestry as a schedule, in other formats, stretched to another run."""

from __future__ import annotations

import argparse
import json
import math

from clantune_scale.cli.command import Answer, Command
from clantune_scale.cli.opened_run import OpenedRun, add_run_argument, open_run
from clantune_scale.core.stretch import rate_factor, stretched
from clantune_scale.errors import ClanError
from clantune_scale.results.schedule_formats import Fragment, to_csv, to_deepspeed
from clantune_scale.tracking.history import rounds_of


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_argument(parser)
    parser.add_argument("--format", choices=("json", "csv", "deepspeed"), default="json", help="default: json")
    parser.add_argument("--member", type=int, help="whose ancestry to follow (default: the champion's)")
    parser.add_argument("--steps", type=int, help="stretch to this many optimizer steps (linear in the step)")
    parser.add_argument("--batch", type=int, help="train_batch_size of the run that will replay it")
    parser.add_argument(
        "--rate-rule", choices=("none", "sqrt", "linear"), help="how learning rates follow --batch (default: none)"
    )


def _run(arguments: argparse.Namespace) -> Answer:
    if arguments.rate_rule and arguments.batch is None:
        raise ClanError("--rate-rule sets how learning rates follow the batch, but no batch is given. Add --batch N.")
    run = open_run(arguments.run_path)
    schedule = run.schedule(arguments.member)
    factor = 1.0
    if arguments.batch is not None:
        old = run.start["batch"]["clan_batch"]
        factor = rate_factor(arguments.rate_rule or "none", old_batch=old, new_batch=arguments.batch)
    schedule = stretched(schedule, num_steps=arguments.steps, factor=factor)
    plain = json.loads(schedule.to_json())
    if arguments.format == "csv":
        text = to_csv(schedule)
        return Answer(text, {**plain, "csv": text})
    if arguments.format == "deepspeed":
        fragment = to_deepspeed(schedule, base_lr=base_rate(run))
        return Answer(
            _describe(fragment),
            {"config": fragment.config, "lost": list(fragment.lost), "worst_rate_ratio": fragment.worst_rate_ratio},
        )
    return Answer(schedule.to_json(), plain)


def base_rate(run: OpenedRun) -> float | None:
    """The learning rate that the ``lr`` gene multiplied, if it was constant; None otherwise."""
    genes = [gene for gene in run.start["genes"] if gene["target"] == "lr"]
    bases = []
    for event in rounds_of(run.events):
        for member, rate in zip(event["members"], event.get("learning_rates", ()), strict=False):
            factor = event.get("lr_factor", 1.0)
            for gene in genes:
                factor *= member["genome"]["values"][gene["name"]] if gene["relative"] else math.nan
            bases.append(rate / factor if factor else math.nan)
    is_constant = bool(bases) and all(math.isclose(base, bases[0], rel_tol=1e-6) for base in bases)
    return bases[0] if is_constant else None


def _describe(fragment: Fragment) -> str:
    lines = [json.dumps(fragment.config, indent=1)] if fragment.config else []
    lines += [f"// lost: {lost}" for lost in fragment.lost]
    return "\n".join(lines)


COMMAND = Command(
    name="schedule",
    summary="the schedule that a run found",
    description="""Prints what the champion's ancestors trained with, step by step, to be replayed without a clan:

  from clantune_scale import ClanSchedule, ClanScheduleLR
  schedule = ClanSchedule.from_json(open("schedule.json").read())
  deepspeed.initialize(..., lr_scheduler=lambda optimizer: ClanScheduleLR(optimizer, schedule))

The JSON has "schema" and "kind"; "genes" (name, target, groups, whether relative); "rate_factor", on every learning
rate; "segments", in order and without gaps: start_step, end_step, "values" by gene, "lr_factor" (the final decay's
share in the first step and in end_step, linear between: your own schedule's learning rate is at most this times its
value at the start of the decay), and "undone" if the training was rolled back. Relative values multiply the run's own
settings.

--steps stretches the step axis linearly. --batch without --rate-rule changes nothing; with it, learning rates are
multiplied by new/old batch (linear) or its square root (sqrt). A DeepSpeed fragment lists what it cannot
express.""",
    examples="""  clantune schedule quickstart > schedule.json
  clantune schedule quickstart --steps 100000 --batch 256 --rate-rule sqrt
  clantune schedule quickstart --format csv | column -s, -t | less
  clantune schedule quickstart --format deepspeed""",
    add_arguments=_add_arguments,
    run=_run,
)
