"""``clantune``: finds the command, runs it, prints its answer; an error is one sentence and exit code 2."""

# PYTHON_ARGCOMPLETE_OK
from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from clantune_scale.cli import completion, export, lineage, plan, report, schedule, validate, watch
from clantune_scale.cli.command import Answer, Command
from clantune_scale.errors import ClanError

COMMANDS: tuple[Command, ...] = (
    validate.COMMAND,
    plan.COMMAND,
    watch.COMMAND,
    report.COMMAND,
    schedule.COMMAND,
    lineage.COMMAND,
    export.COMMAND,
    completion.COMMAND,
)

#: Exit code of an error; 1 is a command's "no".
ERROR = 2
_INTERRUPTED = 130
_EXAMPLES = """examples:
  clantune validate ds.json --world-size 64
  clantune plan ds.json --params 7e9 --world-size 64 --hardware h100 --tokens-per-sample 4096
  clantune watch clan_runs/quickstart
  clantune schedule clan_runs/quickstart --format csv

RUN is a run's folder, its events.jsonl, or its name in ./clan_runs. All commands also read runs that have not ended."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of ``clantune`` with all its commands."""
    parser = argparse.ArgumentParser(
        prog="clantune",
        description="Clan training: plan a run, follow it, and export its results.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"clantune {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        one = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.description,
            epilog=f"examples:\n{command.examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(one)
        one.add_argument("--json", action="store_true", help="print the answer as one JSON object")
        one.set_defaults(run=command.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: the command line without the program's name; ``sys.argv``'s if None.

    Returns:
        The process's exit code: 0, 1 for an answer that is "no", 2 for an error (argparse's own too).
    """
    parser = build_parser()
    completion.complete(parser)
    parsed = parser.parse_args(arguments)
    try:
        answer = parsed.run(parsed)
        _print(answer, as_json=parsed.json)
    except BrokenPipeError:
        # The reader (`| head`) has what it wants. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _INTERRUPTED
    except (ClanError, OSError) as error:
        print(f"clantune {parsed.command}: {_sentence(error)}", file=sys.stderr)
        return ERROR
    return answer.exit_code


def _print(answer: Answer, *, as_json: bool) -> None:
    text = json.dumps(answer.data, indent=1, allow_nan=False) if as_json else answer.text
    if text:
        print(text, flush=True)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}. Check the path and its permissions."
    return str(error)


def _version() -> str:
    try:
        return version("clantune-scale")
    except PackageNotFoundError:
        return "(not installed)"
