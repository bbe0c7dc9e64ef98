"""Two processes never continue one run at once; a lock that was left behind does not keep anyone out."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from clantune_scale.checkpoint.lock import NAME, RunLock
from clantune_scale.errors import CheckpointError

HOLD = "import sys, time; from pathlib import Path; from clantune_scale.checkpoint.lock import RunLock; "
HOLD += "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_living_process_keeps_others_out_and_a_dead_one_does_not(tmp_path, holder):
    with pytest.raises(CheckpointError, match=rf"being written by process {holder.pid} on {socket.gethostname()}"):
        RunLock(tmp_path)
    holder.kill()
    holder.wait()
    lock = RunLock(tmp_path)
    assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    lock.release()
    lock.release()
    assert not (tmp_path / NAME).exists()


def test_a_process_number_that_is_used_again_is_another_process(tmp_path):
    own = {"host": socket.gethostname(), "pid": os.getppid(), "started": "1"}
    (tmp_path / NAME).write_text(json.dumps(own))
    RunLock(tmp_path).release()


def test_a_lock_of_another_host_counts_while_it_is_touched(tmp_path):
    path = tmp_path / NAME
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1"}))
    is_over = threading.Event()

    def beat():
        while not is_over.wait(0.02):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(CheckpointError, match="process 1 on elsewhere"):
        RunLock(tmp_path, stale_s=0.5)
    is_over.set()
    thread.join()
    began = time.monotonic()
    RunLock(tmp_path, stale_s=0.2).release()
    assert time.monotonic() - began >= 0.2


def test_a_torn_lock_is_taken_over_when_nobody_touches_it(tmp_path):
    (tmp_path / NAME).write_text("{")
    RunLock(tmp_path, stale_s=0.1).release()


def test_a_later_epoch_of_the_launch_takes_over_from_a_frozen_one(tmp_path, holder):
    lock = json.loads((tmp_path / NAME).read_text())
    (tmp_path / NAME).write_text(json.dumps({**lock, "launch": "a", "generation": 1}))
    for generation in (("b", 2), ("a", 1)):
        with pytest.raises(CheckpointError, match=f"being written by process {holder.pid}"):
            RunLock(tmp_path, generation=generation)
    taken = RunLock(tmp_path, generation=("a", 2))
    later = RunLock(tmp_path, generation=("a", 3))
    # Who was taken over from leaves the file to who did.
    taken.release()
    assert json.loads((tmp_path / NAME).read_text())["generation"] == 3
    later.release()
    assert not (tmp_path / NAME).exists()
