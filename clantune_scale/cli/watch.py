"""``clantune watch``: a run as it goes, from another terminal."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from clantune_scale.cli.command import Answer, Command
from clantune_scale.cli.opened_run import OpenedRun, add_run_argument, find_run, open_run
from clantune_scale.tracking.history import end_of, rounds_of


def standing(run: OpenedRun) -> dict[str, Any]:
    """Where a run stands, as plain data: status, step, round, the members' last losses and genomes."""
    rounds, end = rounds_of(run.events), end_of(run.events)
    return {
        "name": run.start["name"],
        "status": run.status,
        "step": run.events[-1]["step"],
        "total_steps": run.start.get("total_steps"),
        "rounds": len(rounds),
        "members": [_member(member) for member in rounds[-1]["members"]] if rounds else [],
        "champion": end.get("champion") if end else None,
        "last_event_time_s": run.events[-1]["time_s"],
    }


def _member(member: Mapping[str, Any]) -> dict[str, Any]:
    # A number that is not finite is no JSON.
    loss = member["loss"]
    return {
        "member": member["member"],
        "loss": loss if loss is not None and abs(loss) < float("inf") else None,
        "genome": member["genome"]["values"],
        "donor": member["donor"],
    }


def _run(arguments: argparse.Namespace) -> Answer:
    if arguments.json:
        return Answer("", standing(open_run(arguments.run_path)))
    from clantune_scale.tracking.watch import watch

    watch(find_run(arguments.run_path))
    return Answer("", None)


COMMAND = Command(
    name="watch",
    summary="follow a run",
    description="""Shows a run's rounds as they end, until it ends or you press Ctrl-C; the run is not affected.
With --json it prints the current state of the run and ends.""",
    examples="""  clantune watch quickstart
  clantune watch quickstart --json | jq .step""",
    add_arguments=add_run_argument,
    run=_run,
)
