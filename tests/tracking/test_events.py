"""The events file: what goes in comes out, also when it is not JSON's, and also when the machine dies."""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path

import numpy as np
import pytest

from clantune_scale.config.schema import ClanConfig
from clantune_scale.core.genome import Gene
from clantune_scale.core.rounds import PhaseKind
from clantune_scale.errors import ClanError
from clantune_scale.tracking.events import EventLog, read_events


@pytest.fixture
def log(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    yield log
    log.close()


def test_an_event_is_on_disk_when_append_returns(log):
    returned = log.append("step", 3, {"loss": 1.5})
    (read,) = read_events(log.path)
    assert read == returned and read["schema"] == 1 and read["kind"] == "step" and read["step"] == 3


def test_types_become_plain_data(log):
    fields = {
        "gene": Gene("lr"),
        "config": ClanConfig(population_size=2),
        "array": np.arange(2.0),
        "scalar": np.float32(0.5),
        "phase": PhaseKind.COMPETITIVE,
        "path": Path("a/b"),
    }
    log.append("run_start", 0, fields)
    (event,) = read_events(log.path)
    assert event["gene"]["bounds"] == [1e-3, 1e3] and event["config"]["population_size"] == 2
    assert event["array"] == [0.0, 1.0] and event["scalar"] == 0.5
    assert event["phase"] == "competitive" and event["path"] == "a/b"


def test_not_finite_floats_come_back_and_the_file_is_standard_json(log):
    log.append("round_end", 1, {"loss": [math.inf, -math.inf, math.nan, np.float64("inf")]})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads(log.path.read_text(), parse_constant=refuse)
    positive, negative, nan, numpy_inf = read_events(log.path)[0]["loss"]
    assert (positive, negative, numpy_inf) == (math.inf, -math.inf, math.inf) and math.isnan(nan)


def test_a_torn_last_line_is_left_out(log):
    log.append("step", 1, {})
    log.append("step", 2, {})
    torn = log.path.read_bytes()[:-10]
    log.path.write_bytes(torn)
    assert [event["step"] for event in read_events(log.path)] == [1]


def test_a_torn_line_in_the_middle_is_an_error(log):
    log.append("step", 1, {})
    log.path.write_text('{"schema": 1, "ki\n' + log.path.read_text())
    with pytest.raises(ClanError, match="line 1 of .* is not an event"):
        read_events(log.path)


def test_a_newer_schema_is_an_error(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"schema": 2, "kind": "step", "step": 0}\n')
    with pytest.raises(ClanError, match="schema 2, this package reads 1"):
        read_events(path)


def test_a_record_is_never_continued_by_another_run(log):
    with pytest.raises(FileExistsError):
        EventLog(log.path)


def test_credentials_do_not_reach_the_file(log):
    log.append("run_start", 0, {"config": {"uri": "https://me:hunter2@host/path?token=abc&x=1"}})
    assert read_events(log.path)[0]["config"]["uri"] == "https://***@host/path?token=***&x=1"


def test_what_a_full_disk_does_not_take_is_written_when_there_is_room(log):
    log.append("step", 1, {"loss": 1.0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel takes the first half of the next line and then refuses, as a disk does that fills up.
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.num_bytes + 30, limits[1]))
    try:
        log.append("step", 2, {"loss": 2.0})
        log.append("step", 3, {"loss": 3.0})
        waiting, length = log.num_waiting, log.num_bytes
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert waiting > 0 and log.path.stat().st_size == length - waiting
    assert [event["step"] for event in read_events(log.path)] == [1]
    log.append("step", 4, {"loss": 4.0})
    assert log.num_waiting == 0 and log.path.stat().st_size > length
    assert [event["step"] for event in read_events(log.path)] == [1, 2, 3, 4]
