"""``clantune report``: a run as one page."""

from __future__ import annotations

import argparse

from clantune_scale.cli.command import Answer, Command
from clantune_scale.cli.opened_run import add_run_argument, open_run


def _run(arguments: argparse.Namespace) -> Answer:
    # It draws with matplotlib, which takes a second to import.
    from clantune_scale.tracking.report import write_report

    run = open_run(arguments.run_path)
    page = write_report(run.folder)
    return Answer(f"{page}", {"page": str(page), "status": run.status, "step": run.events[-1]["step"]})


COMMAND = Command(
    name="report",
    summary="a run as one self-contained HTML page",
    description="""Writes report.html and its pictures into the run's folder: fitness, genes, the family tree, where the
time went, the schedule that was found, and what it means for the next run.""",
    examples="""  clantune report quickstart
  clantune report quickstart --json | jq -r .page | xargs firefox""",
    add_arguments=add_run_argument,
    run=_run,
)
