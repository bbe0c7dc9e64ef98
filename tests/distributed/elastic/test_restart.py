"""A process in its next life: same id, same command, nothing of the old one left open."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import clantune_scale

SCRIPT = """
import json, os, socket, sys, time
print(json.dumps({
    "pid": os.getpid(), "cwd": os.getcwd(), "argv": sys.argv[1:], "life": os.environ.get("LIFE"),
    "descriptors": len(os.listdir("/proc/self/fd")),
}), flush=True)
if os.environ.get("LIFE"):
    sys.exit(3)
from clantune_scale.distributed.elastic.restart import restart_process
import multiprocessing
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(300,), daemon=True)
worker.start()
print(json.dumps({"worker": worker.pid}), flush=True)
opened = [socket.socket() for _ in range(5)]
for one in opened:
    os.set_inheritable(one.fileno(), True)
os.chdir("/")
os.environ["LIFE"] = "2"
restart_process()
"""


def test_a_process_starts_again(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-u", "script.py", "--flag", "a b"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(clantune_scale.__file__).parents[1])},
    )
    assert done.returncode == 3, done.stderr
    first, worker, second = map(json.loads, done.stdout.splitlines())
    assert second == {**first, "life": "2"}
    assert second["argv"] == ["--flag", "a b"] and second["cwd"] == str(tmp_path)
    assert not Path(f"/proc/{worker['worker']}").exists() or _is_dead(worker["worker"])


def _is_dead(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
