"""The faults benchmark covers every engine, and reports a fault that fails its check."""

from __future__ import annotations

import json

import pytest

from clantune_scale.bench.faults import kills, results, survivors
from clantune_scale.bench.faults.damage import _flip
from clantune_scale.bench.faults.injector import POINTS
from clantune_scale.bench.faults.kills import differences
from clantune_scale.bench.faults.results import FaultResult
from clantune_scale.bench.faults.sections import SECTIONS, THREES, WORKLOADS, parts
from clantune_scale.bench.faults.workload import Workload, stood
from clantune_scale.errors import ConfigError


def test_every_point_gets_a_fault_at_its_begin_and_its_end_and_on_every_rank():
    faults = [fault for place in range(len(WORKLOADS)) for fault in kills.faults(place, 4, 2)]
    assert len(faults) >= 50
    assert {fault.point.partition(":")[0] for fault in faults} == set(POINTS)
    assert {fault.rank for fault in faults} == {0, 1, 2, 3}
    moments = {point: {":after" in f.point for f in faults if f.point.startswith(point)} for point, _ in kills.POINTS}
    assert all(found == {True, False} for found in moments.values()), moments
    assert len(THREES) * len(survivors.POINTS) == 20


def test_sections_name_their_workloads():
    assert [section for section, _ in parts(list(SECTIONS))][-3:] == ["files", "resumes", "mlflow"]
    assert list(parts(["survivors"])) == [("survivors", name) for name in THREES]


def test_a_table_counts_what_came_out_right(tmp_path):
    found = [
        FaultResult("a kill", "DDP", "one"),
        FaultResult("a kill", "DDP", "two", "lost"),
        FaultResult("a kill", "ZeRO", "one"),
    ]
    lines = results.table(found).splitlines()[2:]
    assert lines == ["| a kill | DDP, ZeRO | 3 | 2 |"]
    results.write(tmp_path / "results", found)
    assert results.read(tmp_path / "results") == found
    assert found[1].line == "FAILED  a kill | DDP | two  lost"


def test_a_rank_that_stands_otherwise_is_a_difference(tmp_path):
    for name, weights in (("ours", "a"), ("theirs", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stood-0-0.json").write_text(json.dumps({"weights": weights, "draw": "1"}))
    ours, theirs = stood(tmp_path / "ours"), stood(tmp_path / "theirs")
    assert differences(ours, ours) == ""
    assert differences(ours, theirs) == "not equal to the last bit: {'stood-0-0': ['weights']}"
    assert "ranks [] ended" in differences({}, theirs)


def test_a_flip_is_of_one_bit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    _flip(path)
    assert path.read_bytes() == b"acc"


def test_without_the_repository_the_command_says_what_is_missing():
    with pytest.raises(ConfigError, match="nowhere.families.zero cannot be imported.*clone of the repository"):
        _ = Workload("zero", "1", families="nowhere.families").setup
