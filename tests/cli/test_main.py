"""The command line as a whole: help, errors, exit codes, pipes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clantune_scale.cli.main import COMMANDS

NAMES = [command.name for command in COMMANDS]


def test_help_lists_every_command_with_its_line(call):
    said = call("--help")
    assert said.code == 0
    for command in COMMANDS:
        assert command.name in said.out and " ".join(command.summary.split()[:4]) in " ".join(said.out.split())


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help_with_examples_of_itself(name, call):
    said = call(name, "--help")
    assert said.code == 0 and "examples:" in said.out and f"clantune {name}" in said.out.partition("examples:")[2]
    assert "--json" in said.out


@pytest.mark.parametrize("name", ["schedule", "lineage", "export", "report"])
def test_what_is_no_run_is_one_sentence_and_its_remedy(name, call, tmp_path):
    said = call(name, tmp_path / "nowhere")
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith(f"clantune {name}: ") and "is no run" in said.err and "Give a run's folder" in said.err
    assert said.err.count("\n") == 1


def test_an_unknown_command_is_refused_with_the_known_ones(call):
    said = call("shedule")
    assert said.code == 2 and "schedule" in said.err


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ("", "has no run_start"),
        ('{"schema": 99, "kind": "run_start"}\n', "Upgrade"),
        ("[1]\n\n", "events.jsonl"),
        ("{\n{}\n", "events.jsonl"),
    ],
)
def test_damaged_and_newer_events_are_said_in_a_sentence(events, message, call, tmp_path):
    (tmp_path / "events.jsonl").write_text(events)
    said = call("lineage", tmp_path)
    assert said.code == 2 and message in said.err and "Traceback" not in said.err


def test_a_newer_schedule_is_refused(call, finished_run, tmp_path):
    (tmp_path / "events.jsonl").write_text((finished_run.folder / "events.jsonl").read_text())
    (tmp_path / "schedule.json").write_text(json.dumps({"kind": "clan_schedule", "schema": 2}))
    said = call("schedule", tmp_path)
    assert said.code == 2 and "schema version 2, and this version reads 1" in said.err


def test_a_run_may_be_named_by_its_events_or_in_clan_runs(call, finished_run, tmp_path, monkeypatch):
    by_file = call("watch", finished_run.folder / "events.jsonl", "--json")
    (tmp_path / "clan_runs").mkdir()
    (tmp_path / "clan_runs" / "mine").symlink_to(finished_run.folder)
    monkeypatch.chdir(tmp_path)
    assert call("watch", "mine", "--json").data == by_file.data


def test_a_reader_that_leaves_early_gets_no_complaint(finished_run):
    command = (
        f"{sys.executable} -m clantune_scale.cli lineage {finished_run.folder} | head -c 1; echo ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("{0\n", "")


def test_commands_that_look_at_a_run_load_neither_torch_nor_deepspeed(finished_run):
    script = (
        "import sys; from clantune_scale.cli.main import main; code = main(sys.argv[1:]); "
        "print(*[m for m in ('torch', 'deepspeed', 'mlflow', 'matplotlib') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "schedule", str(finished_run.folder)], capture_output=True, text=True, check=True
    )
    assert done.stderr.split() == []


@pytest.mark.parametrize(
    "arguments", [("schedule",), ("schedule", "--format", "deepspeed"), ("lineage",), ("watch", "--json"), ("report",)]
)
def test_a_run_of_the_first_schema_is_read(arguments, call, tmp_path):
    """Whole, and from its events alone as a run that goes on has them."""
    kept = Path(__file__).parents[1] / "tracking/data/schema_1"
    for name in ("whole", "alone"):
        shutil.copytree(kept, tmp_path / name)
    for path in (tmp_path / "alone").iterdir():
        if path.name != "events.jsonl":
            path.unlink()
    command, *options = arguments
    for name in ("whole", "alone"):
        said = call(command, tmp_path / name, *options)
        assert said.code == 0 and said.out, said.err
