"""SIGTERM: all ranks stop after the same step, its state is on disk, and the run goes on from there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import clantune_scale
from clantune_scale.checkpoint.preemption import STATUS, Preemption
from clantune_scale.config.schema import CheckpointConfig
from clantune_scale.tracking import read_events
from tests.backends.small_runs import ds_config, in_member_worlds
from tests.checkpoint.runs import launch, named, resumed, seed
from tests.ranks import free_port, run_ranks
from tests.small_clans import clan_config, start

ROOT = Path(clantune_scale.__file__).parents[1]


class Alone:
    """A clan of one rank."""

    is_leader = True

    def __init__(self):
        self.num_meetings = 0

    def gather(self, value):
        self.num_meetings += 1
        return [value]


@pytest.fixture
def before():
    """Signals that reached whoever handled them before."""
    seen = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    yield seen
    signal.signal(signal.SIGTERM, previous)


def test_the_first_signal_raises_a_flag_and_the_second_goes_on(before):
    preemption = Preemption(Alone(), CheckpointConfig(grace_s=60.0))
    preemption.start(0)
    assert not any(preemption.is_due(step) for step in range(1, 12))
    os.kill(os.getpid(), signal.SIGTERM)
    assert before == [] and preemption.is_due(10**6)
    os.kill(os.getpid(), signal.SIGTERM)
    assert before == [signal.SIGTERM]
    # Given back: the next one is no longer ours.
    os.kill(os.getpid(), signal.SIGTERM)
    assert before == [signal.SIGTERM] * 2
    preemption.release()


def test_ranks_meet_about_once_a_second_however_fast_they_step(before):
    everyone = Alone()
    preemption = Preemption(everyone, CheckpointConfig(grace_s=2.0))
    preemption.start(100)
    began, step = time.monotonic(), 100
    while time.monotonic() - began < 1.0:
        step += 1
        preemption.is_due(step)
        time.sleep(0.001)
    preemption.release()
    # A tenth of the grace period is 0.2 s: five in a second, and one or two while the pace was not known.
    assert 3 <= everyone.num_meetings <= 9


GIVES_UP = """
import signal, sys, time
from clantune_scale.checkpoint.preemption import Preemption
from clantune_scale.config.schema import CheckpointConfig
signal.signal(signal.SIGTERM, lambda *_: (print("as before", flush=True), sys.exit(7)))
preemption = Preemption(None, CheckpointConfig(grace_s=0.3))
preemption.start(0)
signal.raise_signal(signal.SIGTERM)
time.sleep(30)
"""


def test_when_the_grace_period_is_over_the_process_ends_as_it_would_have():
    done = subprocess.run([sys.executable, "-c", GIVES_UP], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 7 and done.stdout == "as before\n"
    assert "no state could be committed within the 0.3 s of clantune.checkpoint.grace_s" in done.stderr


def _preempted(rank, config):
    """Rank 3 alone hears the signal, inside a competition."""
    whole = launch(named(config, "whole"), 19)
    seed(0)
    engine, loader = start(named(config, "preempted"), dropout=0.2)
    losses = []
    status = None
    try:
        for inputs in loader:
            loss = engine(*inputs)
            engine.backward(loss)
            if rank == 3 and engine.global_steps == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            engine.step()
            losses.append(loss.item())
    except SystemExit as error:
        status = error.code
    step = engine.global_steps
    again = launch(resumed(config, engine.clan.recorder.run_dir), 19, seeded=5)
    return status, step, again.run_dir, {key for key in whole.exact if whole.exact[key] != again.exact[key]}


def test_one_rank_that_is_signalled_stops_all_and_nothing_is_lost(tmp_path):
    block = {"strategy": "clan", "genes": ["lr", "dropout"], "duty_cycle": 0.4, "total_steps": 40}
    results = run_ranks(4, in_member_worlds, _preempted, clan_config(tmp_path, ds_config(1), **block))
    assert len({result[1] for result in results}) == 1
    for status, _, _, different in results:
        assert status == STATUS == 143 and different == set()
    events = read_events(Path(results[0][2]) / "events.jsonl")
    assert [e["step"] for e in events if e["kind"] == "resume"] == [results[0][1]]


SCRIPT = """
import sys
import numpy, torch
from tests.checkpoint.runs import end, seed
from tests.small_clans import start, train
import json

config = json.loads(open(sys.argv[1]).read())
seed(0)
engine, loader = start(config, dropout=0.1)
for inputs in iter(lambda: next(iter(loader)), None):
    engine.backward(engine(*inputs))
    engine.step()
    if engine.global_steps >= int(sys.argv[2]):
        break
engine.clan.finish()
"""


def _ranks(script, config_path, steps, environment):
    port = free_port()
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **environment}
    return [
        subprocess.Popen(
            [sys.executable, str(script), str(config_path), str(steps)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_real_processes_are_preempted_and_go_on_by_the_printed_command(tmp_path):
    script, config_path = tmp_path / "script.py", tmp_path / "config.json"
    script.write_text(SCRIPT)
    config = named(clan_config(tmp_path, ds_config(1), strategy="classic", total_steps=4000), "real", asynchronous=True)
    config_path.write_text(json.dumps(config))
    processes = _ranks(script, config_path, 4000, {})
    events = tmp_path / "real" / "events.jsonl"
    while not (events.exists() and b'"round": 3' in events.read_bytes()):
        assert all(process.poll() is None for process in processes), processes[0].communicate()
        time.sleep(0.1)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [STATUS, STATUS], said
    stopped = read_events(events)[-1]
    assert (stopped["kind"], stopped["status"]) == ("run_end", "KILLED")
    (line,) = [line for line in said[0].splitlines() if "continue with: export CLANTUNE_RESUME=" in line]
    where = line.split("CLANTUNE_RESUME=")[1].split(" ")[0]
    steps = stopped["step"] + 40
    again = _ranks(script, config_path, steps, {"CLANTUNE_RESUME": where})
    said = [process.communicate(timeout=120)[0] for process in again]
    assert [process.returncode for process in again] == [0, 0], said
    kinds = [event["kind"] for event in read_events(events)]
    assert kinds.count("resume") == 1 and kinds[-1] == "run_end"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_run_goes_on_from_its_last_committed_round_by_the_same_command(tmp_path):
    script, config_path = tmp_path / "script.py", tmp_path / "config.json"
    script.write_text(SCRIPT)
    config = named(clan_config(tmp_path, ds_config(1), strategy="classic", total_steps=4000), "real", resume="latest")
    config_path.write_text(json.dumps(config))
    events, latest = tmp_path / "real" / "events.jsonl", tmp_path / "real" / "rounds" / "LATEST"
    for _ in range(2):
        processes = _ranks(script, config_path, 4000, {})
        before = latest.read_text() if latest.exists() else None
        deadline = time.monotonic() + 60
        while not latest.exists() or latest.read_text() == before:
            assert time.monotonic() < deadline and processes[0].poll() is None, processes[0].communicate()
            time.sleep(0.05)
        for process in processes:
            process.kill()
            process.communicate()
    steps = read_events(events)[-1]["step"] + 20
    last = _ranks(script, config_path, steps, {})
    said = [process.communicate(timeout=120)[0] for process in last]
    assert [process.returncode for process in last] == [0, 0], said
    assert [event["kind"] for event in read_events(events)].count("resume") == 2
    assert not (tmp_path / "real-2").exists()
