"""The log of reports."""

from __future__ import annotations

import re

from clantune_scale.bench.schedules import reports


def test_a_line_has_date_commit_and_command_without_places_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(reports, "commit", lambda: "0123456789ab+")
    log = tmp_path / "log"
    given = ["--report", "--out", "/somewhere/out", "--variants", "/somewhere/else/v.json", "--tasks", "heavy tails"]
    lines = [reports.append(given, log=log), reports.append(["--report", "--out=/x"], log=log)]
    assert log.read_text() == "\n".join([*lines, ""])
    command = r"python -m clantune_scale\.bench\.schedules"
    wanted = rf"\d{{4}}-\d\d-\d\d 0123456789ab\+ {command} --report --variants v\.json --tasks 'heavy tails'"
    assert re.fullmatch(wanted, lines[0])
    assert re.fullmatch(rf"\S+ \S+ {command} --report", lines[1])


def test_the_commit_is_that_of_the_clone_or_unknown(monkeypatch, tmp_path):
    assert re.fullmatch(r"[0-9a-f]{12}\+?|unknown", reports.commit())
    monkeypatch.setattr(reports, "LOG", tmp_path / "log")
    assert reports.commit() == "unknown"
