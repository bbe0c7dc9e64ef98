"""The line that is written over, and everything that must not be on a terminal's copy in a file."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clantune_scale.config.schema import ClanConfig
from clantune_scale.tracking.events import to_plain
from clantune_scale.tracking.live import Lines, Live, Progress, screen
from clantune_scale.tracking.terminal import Terminal
from tests.tracking import sample_run

CONFIG = ClanConfig(population_size=2, genes=["lr"])


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((120, 40)))


class Tty(io.StringIO):
    def isatty(self):
        return True


def visible(written: str) -> list[str]:
    """What is left on the screen: erased lines are gone."""
    rows = [""]
    for piece in re.split(r"(\r\x1b\[2K|\n)", written):
        if piece == "\n":
            rows.append("")
        elif piece.startswith("\r"):
            rows[-1] = ""
        else:
            rows[-1] += piece
    return rows


def show_all(on):
    terminal = Terminal(events_path=Path("events.jsonl"), mlflow_hint=None, on=on)

    def show(kind, step, **fields):
        terminal.show({"kind": kind, "step": step, "time_s": 100.0 + step, **to_plain(fields)})

    show("run_start", 0, **sample_run.start(CONFIG))
    show("phase_start", 0, round=0, phase="cooperative", num_steps=8)
    for step in (4, 8):
        show("step", step, round=0, phase="cooperative", loss=4.0 - step / 8, step_s=0.5, samples=1)
    return show


def test_the_live_line_is_written_over():
    stream = Tty()
    show_all(Live(stream))
    assert visible(stream.getvalue())[-1] == (
        "step 8 of 30 (27%, 0 min left)  round 0 cooperative 8/8  loss 3.0000  0.500 s/step"
    )
    assert "step 4" in stream.getvalue() and not any("step 4" in row for row in visible(stream.getvalue()))


def test_tables_stay_above_it_and_the_end_takes_it_away():
    stream = Tty()
    show = show_all(Live(stream))
    show("round_end", 10, **sample_run.round_end(CONFIG, 0))
    rows = visible(stream.getvalue())
    assert rows[3].startswith("round 0: steps 0 to 10") and rows[-1].startswith("step 8 of 30")
    show("run_end", 10, status="FINISHED", champion=0, champion_loss=1.0, artifacts={})
    rows = visible(stream.getvalue())
    assert rows[-1] == "" and not any(row.startswith("step 8") for row in rows)


def test_a_log_file_has_lines_alone():
    stream = io.StringIO()
    show_all(Lines(stream))
    text = stream.getvalue()
    assert "\x1b" not in text and "\r" not in text
    assert [line.split()[:2] for line in text.splitlines()[-2:]] == [["step", "4"], ["step", "8"]]


@pytest.mark.parametrize(
    ("stream", "term", "kind"), [(Tty(), "xterm", Live), (Tty(), "dumb", Lines), (io.StringIO(), "xterm", Lines)]
)
def test_live_only_on_a_terminal_that_can(stream, term, kind, monkeypatch):
    monkeypatch.setenv("TERM", term)
    assert type(screen(stream)) is kind


def test_a_long_line_does_not_wrap(monkeypatch):
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((20, 5)))
    stream = Tty()
    Live(stream).status("x" * 50)
    assert visible(stream.getvalue()) == ["x" * 19]


def test_time_left_counts_everything_since_the_start():
    progress = Progress()
    progress.take({"kind": "run_start", "step": 0, "time_s": 0.0, "total_steps": 1000})
    progress.take(
        {"kind": "phase_start", "step": 90, "time_s": 0.0, "round": 3, "phase": "cooperative", "num_steps": 20}
    )
    line = progress.take({"kind": "step", "step": 100, "time_s": 800.0, "loss": 1.0, "step_s": 2.0})
    assert line.startswith("step 100 of 1000 (10%, 2 h 00 min left)  round 3 cooperative 10/20")


def test_a_run_of_unknown_length_has_no_share():
    progress = Progress()
    progress.take({"kind": "run_start", "step": 0, "time_s": 0.0, "total_steps": None})
    line = progress.take({"kind": "step", "step": 5, "time_s": 1.0, "loss": 1.0, "step_s": 2.0})
    assert line.startswith("step 5  round 0")


def test_a_stream_without_the_letter_gets_another(tmp_path):
    path = tmp_path / "log"
    with open(path, "w", encoding="ascii") as stream:
        Lines(stream).line("loss 1.0 ± 0.1 läuft")
        Live(stream).line("± se")
    assert path.read_text() == "loss 1.0 +- 0.1 l\\xe4uft\n+- se\n"


_PRINTS = """
import sys
from clantune_scale.tracking.live import Steady, screen
on = Steady(screen())
for step in range(2000):
    on.line(f"step {step} ± and as long as a line of a table is")
    on.status("status")
print("the script's own line")
print("trained", file=sys.stderr)
"""


@pytest.mark.parametrize("kind", ["closed pipe", "full disk", "closed stream", "ascii"])
def test_no_stream_ends_a_process_that_trains(kind):
    code = "import sys; sys.stdout.close()\n" + _PRINTS.replace('print("the', "#") if "stream" in kind else _PRINTS
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"} if kind == "ascii" else dict(os.environ)
    environment.pop("PYTHONUNBUFFERED", None)  # with it, the script's own line would fail as it does without a clan
    command = [sys.executable, "-c", code]
    if kind == "full disk":
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    else:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        if kind == "closed pipe":
            process.stdout.close()
            process.stdout = None
        _, error = process.communicate()
        done = subprocess.CompletedProcess(command, process.returncode, "", error)
    assert done.stderr.splitlines()[-1] == "trained" or kind == "full disk", done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("takes no lines") == (kind != "ascii")
    # With a full disk the script's own last line fails when Python ends, as it does without a clan.
    assert done.returncode == (120 if kind == "full disk" else 0)
