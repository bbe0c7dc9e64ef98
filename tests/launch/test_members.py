"""One launcher per member: a rank is killed, its launcher ends its member, and the others finish the run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clantune_scale.bench.faults.injector import Fault, to_environ
from clantune_scale.tracking import read_events
from tests.ranks import free_port

ROOT = Path(__file__).parents[2]
SCRIPT = """
import runpy, sys
from clantune_scale.bench.faults.injector import install
install()
launch = {launch!r}
sys.path.insert(0, launch)
runpy.run_path(launch + "/pretrain_gpt.py", run_name="__main__")
"""


def clan(folder: Path, fault: Fault, *, members: int, ranks: int) -> subprocess.CompletedProcess:
    config = json.loads((ROOT / "configs" / "quickstart.json").read_text())
    config["train_batch_size"] = 8 * members
    config["clantune"] |= {
        "population_size": members,
        "round_length": 10,
        "total_steps": 200,
        "fitness": {"num_samples": 32, "batch_size": 8},
        "tracking": {"run_name": "run", "mlflow": False},
        # Deepspeed takes seconds to import, and longer for one process than for another on a busy machine.
        "faults": {"min_members": 2, "deadline_s": 60.0, "rejoin_s": 15.0},
    }
    (folder / "ds.json").write_text(json.dumps(config))
    (folder / "script.py").write_text(SCRIPT.format(launch=str(ROOT / "launch")))
    environ = {key: value for key, value in os.environ.items() if not key.startswith("CLANTUNE_")}
    environ |= to_environ([fault]) | {"MEMBERS": str(members), "RANKS": str(ranks), "MASTER_PORT": str(free_port())}
    environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
    command = [ROOT / "launch" / "members.sh", "script.py", "--deepspeed", "--deepspeed_config", "ds.json"]
    command += ["--steps", "40", "--context", "32", "--width", "16", "--layers", "1", "--test_windows", "32"]
    return subprocess.run(
        [str(part) for part in command], cwd=folder, env=environ, capture_output=True, text=True, timeout=280
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("killed", [1, 0])
def test_the_others_finish_the_run(tmp_path, killed):
    done = clan(tmp_path, Fault(killed, "forward", 25), members=3, ranks=1)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    # -9 as an exit status.
    assert f"members.sh: the launcher of member {killed} ended with status 247" in done.stderr
    assert done.stderr.count("members.sh: the launcher") == 1
    events = list(read_events(tmp_path / "clan_runs" / "run" / "events.jsonl"))
    (lost,) = [event for event in events if event["kind"] == "member_lost"]
    assert list(lost["members"]) == [str(killed)] and len(lost["left"]) == 2
    assert events[-1]["kind"] == "run_end" and events[-1]["status"] == "FINISHED" and events[-1]["step"] == 40


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_launcher_ends_the_whole_member_and_too_few_stop(tmp_path):
    done = clan(tmp_path, Fault(3, "forward", 25), members=2, ranks=2)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-6000:]
    assert "1 members are left and clantune.faults.min_members is 2" in done.stderr
    assert "members.sh: the launcher of member 1 ended with status 247" in done.stderr
    assert "members.sh: the launcher of member 0 ended with status 1" in done.stderr
