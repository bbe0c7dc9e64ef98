"""``clantune completion``: a shell that has it completes our commands and options."""

from __future__ import annotations

import subprocess
import sys

import pytest

_ASK = """
import os, sys
os.environ.update(_ARGCOMPLETE="1", _ARGCOMPLETE_IFS=" ", COMP_LINE=sys.argv[1], COMP_POINT=str(len(sys.argv[1])))
import argcomplete
from clantune_scale.cli.main import build_parser
argcomplete.autocomplete(build_parser(), output_stream=open(sys.argv[2], "w"), exit_method=sys.exit)
"""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("clantune sch", {"schedule"}),
        ("clantune schedule run --format c", {"csv"}),
        ("clantune plan --har", {"--hardware"}),
    ],
)
def test_commands_options_and_choices_are_completed(line, expected, tmp_path):
    subprocess.run([sys.executable, "-c", _ASK, line, str(tmp_path / "said")], check=True)
    assert {word.strip() for word in (tmp_path / "said").read_text().split()} == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_code_of_each_shell_is_printed(shell, call):
    said = call("completion", shell)
    assert said.code == 0 and "clantune" in said.out


def test_bash_takes_it(call):
    code = call("completion", "bash").out
    subprocess.run(["bash", "-n"], input=code, text=True, check=True)


def test_without_argcomplete_it_is_said_how_to_get_it(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    said = call("completion", "bash")
    assert said.code == 2 and "pip install 'clantune-scale[completion]'" in said.err
