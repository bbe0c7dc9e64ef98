"""``clantune watch`` and ``clantune report``: the tracking package's, reached from the command line."""

from __future__ import annotations

import shutil

import pytest


def test_where_a_run_stands(call, finished_run):
    whole, half = (call("watch", folder, "--json").data for folder in (finished_run.folder, finished_run.half))
    assert (whole["status"], whole["step"], whole["rounds"]) == ("FINISHED", 40, len(finished_run.lineage))
    assert whole["champion"] in (0, 1) and half["champion"] is None
    assert half["status"] == "RUNNING" and 0 < half["step"] < 40
    assert [member["loss"] for member in half["members"]] == list(finished_run.lineage[half["rounds"] - 1].losses)


def test_watching_a_finished_run_shows_its_rounds_and_ends(call, finished_run):
    said = call("watch", finished_run.folder)
    assert said.code == 0 and "round" in said.out and "FINISHED" in said.out


@pytest.mark.parametrize("run", ["folder", "half"])
def test_a_report_is_written_for_a_run_that_is_over_and_one_that_goes_on(call, finished_run, run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(getattr(finished_run, run), folder)
    said = call("report", folder, "--json")
    assert said.code == 0 and said.data["page"] == str(folder / "report.html")
    assert "<html" in (folder / "report.html").read_text()[:500]
