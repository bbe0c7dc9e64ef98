"""Messages go through ``logging``: seen by default, and for the user to route and to silence."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import clantune_scale

PACKAGE = Path(clantune_scale.__file__).parent

# The leader's terminal, told of a step and of a warning.
SCRIPT = """
import logging, sys
from pathlib import Path
from clantune_scale.tracking.terminal import Terminal
{setup}
terminal = Terminal(events_path=Path("events.jsonl"), mlflow_hint=None)
step = dict(kind="step", step=7, time_s=0.0, round=0, phase="cooperative", loss=1.5, step_s=0.1)
terminal.show(step)
terminal.show(dict(kind="warning", step=7, time_s=0.0, message="the server is away"))
"""
ROUTED = """logging.basicConfig(filename="log.txt", format="%(name)s %(levelname)s %(message)s")"""
SILENT = """logging.getLogger("clantune_scale").setLevel(logging.CRITICAL + 1)"""


@pytest.mark.parametrize(
    ("setup", "on_stderr", "in_file"),
    [
        ("", "clan warning: the server is away\n", None),
        (ROUTED, "", "clantune_scale.tracking.terminal WARNING clan warning: the server is away\n"),
        (SILENT, "", None),
    ],
    ids=["default", "routed", "silent"],
)
def test_a_message_is_seen_by_default_and_goes_where_the_user_says(setup, on_stderr, in_file, tmp_path):
    script = SCRIPT.format(setup=setup)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    # Lines of steps are no messages: they stay on the terminal whatever becomes of the others.
    assert done.stdout.startswith("step      7") and "server" not in done.stdout
    assert done.stderr == on_stderr
    assert ((tmp_path / "log.txt").read_text() if in_file else None) == in_file


def test_nothing_but_a_command_line_prints_to_standard_error():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        place = str(path.relative_to(PACKAGE))
        is_command = "__name__ ==" in path.read_text() or place.startswith(("cli/", "bench/"))
        for node in ast.walk(ast.parse(path.read_text())):
            is_print = isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
            if is_print and not is_command and any(ast.unparse(k.value) == "sys.stderr" for k in node.keywords):
                found.append(place)
    assert not found
