"""A command: its arguments, and an answer that is both text for people and data for machines."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What a command answers.

    Attributes:
        text: for people, on standard output; nothing is printed if it is empty.
        data: the same as plain data, printed as one JSON object under ``--json``.
        exit_code: 0, or 1 if the answer is "no" (a config with errors).
    """

    text: str
    data: Any
    exit_code: int = 0


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        name: as it is typed.
        summary: one line for the list of commands.
        description: what it does, for its own help.
        examples: command lines, each with a short comment, for its own help.
        add_arguments: adds its arguments to a parser.
        run: from the parsed arguments to an answer.
    """

    name: str
    summary: str
    description: str
    examples: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Answer]
