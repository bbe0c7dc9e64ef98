"""Following a run from elsewhere."""

from __future__ import annotations

import json
import threading
import time

import pytest

from clantune_scale.errors import ClanError
from clantune_scale.tracking import watch as watching
from clantune_scale.tracking.events import cut_events
from clantune_scale.tracking.live import Lines
from clantune_scale.tracking.watch import watch
from tests.tracking import simulated_run


@pytest.fixture
def seen():
    class Seen(Lines):
        def __init__(self):
            super().__init__()
            self.lines = []

        def line(self, text):
            self.lines.append(text)

    return Seen()


END = {"schema": 1, "kind": "run_end", "time_s": 9.0, "step": 60, "status": "FAILED", "champion": None, "artifacts": {}}


def lines_of(num_rounds, *, end=True):
    events = [*simulated_run.events(num_rounds=num_rounds, num_members=4), *([END] if end else [])]
    return [json.dumps(event).encode() + b"\n" for event in events]


def titles(lines):
    return [line.split(":")[0] for line in lines if line.startswith("round ")]


def test_a_finished_run_is_shown_at_once(tmp_path, seen):
    (tmp_path / "events.jsonl").write_bytes(b"".join(lines_of(3)))
    assert watch(tmp_path, on=seen, poll_s=60) == "FAILED"
    assert seen.lines[0].startswith("clan simulated: 4 members x 1 rank")
    assert titles(seen.lines) == ["round 0", "round 1", "round 2"]
    assert seen.lines[-2].startswith("clan FAILED after 60 steps")


def test_of_a_long_past_the_last_rounds_are_shown(tmp_path, seen):
    (tmp_path / "events.jsonl").write_bytes(b"".join(lines_of(20)))
    watch(tmp_path, on=seen, past_rounds=2)
    assert titles(seen.lines) == ["round 18", "round 19"] and "(18 earlier rounds are in the events file)" in seen.lines


def test_a_run_that_starts_later_and_writes_torn_lines(tmp_path, seen):
    """Every line arrives in two pieces, the folder after the watcher."""
    folder = tmp_path / "later"

    def write():
        time.sleep(0.1)
        folder.mkdir()
        with open(folder / "events.jsonl", "wb", buffering=0) as file:
            for line in lines_of(2):
                file.write(line[:40])
                time.sleep(0.02)
                file.write(line[40:])
                time.sleep(0.02)

    writer = threading.Thread(target=write)
    writer.start()
    assert watch(folder, on=seen, poll_s=0.005, timeout_s=30) == "FAILED"
    writer.join()
    assert seen.lines[0] == f"waiting for {folder / 'events.jsonl'}"
    assert titles(seen.lines) == ["round 0", "round 1"]


def test_it_gives_up_when_nothing_comes(tmp_path, seen):
    assert watch(tmp_path / "never", on=seen, poll_s=0.01, timeout_s=0.05) is None
    (tmp_path / "events.jsonl").write_bytes(b"".join(lines_of(1, end=False)) + b'{"schema": 1, "ki')
    assert watch(tmp_path, on=seen, poll_s=0.01, timeout_s=0.05) is None
    assert titles(seen.lines) == ["round 0"]


def test_silence_is_mentioned_once(tmp_path, seen, monkeypatch):
    monkeypatch.setattr(watching, "_SILENCE_S", 0.02)
    (tmp_path / "events.jsonl").write_bytes(b"".join(lines_of(1, end=False)))
    watch(tmp_path, on=seen, poll_s=0.01, timeout_s=0.1)
    assert sum("died silently" in line for line in seen.lines) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [(b"no event\n", "line 1 of .* is not an event"), (b'{"schema": 99, "kind": "x"}\n', "schema 99")],
)
def test_a_file_that_is_no_run(tmp_path, seen, line, message):
    (tmp_path / "events.jsonl").write_bytes(line)
    with pytest.raises(ClanError, match=message):
        watch(tmp_path, on=seen)


def test_a_run_that_is_resumed_is_followed_into_its_new_file(tmp_path, seen):
    """The last round's events are taken back and told anew; the rounds before are not told twice."""
    path = tmp_path / "events.jsonl"
    lines = lines_of(3, end=False)
    kept = next(i for i, line in enumerate(lines) if b'"round_end"' in line and b'"round": 1' in line) + 1
    path.write_bytes(b"".join(lines))
    watcher = threading.Thread(target=watch, args=(tmp_path,), kwargs={"on": seen, "poll_s": 0.01, "timeout_s": 20})
    watcher.start()
    while titles(seen.lines) != ["round 0", "round 1", "round 2"]:
        time.sleep(0.01)
    assert cut_events(path, len(b"".join(lines[:kept]))) == "events.lost-1.jsonl"
    assert (tmp_path / "events.lost-1.jsonl").read_bytes() == b"".join(lines[kept:])
    latest = max(json.loads(line)["time_s"] for line in lines)
    resume = {
        "kind": "resume",
        "name": "simulated",
        "resumed_from": "round-000001",
        "lost_events": "events.lost-1.jsonl",
    }
    again = [{"schema": 1, "step": 40, "total_steps": 60, **resume}, *map(json.loads, lines[kept:]), END]
    with open(path, "ab") as file:
        for number, event in enumerate(again):
            file.write(json.dumps(event | {"time_s": latest + 1 + number}).encode() + b"\n")
    watcher.join(20)
    assert not watcher.is_alive()
    assert titles(seen.lines) == ["round 0", "round 1", "round 2", "round 2"]
    assert any("resumes after 40 steps" in line and "round-000001" in line for line in seen.lines)
    assert seen.lines[-2].startswith("clan FAILED after 60 steps")
