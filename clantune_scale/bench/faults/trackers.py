"""An MLflow server that refuses, hangs or dies: the run ends as without MLflow, and can be uploaded later."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from clantune_scale.bench.faults.kills import differences
from clantune_scale.bench.faults.results import FaultResult
from clantune_scale.bench.faults.workload import Workload, events, last_words, stood, uninterrupted


def inject(workload: Workload, name: str, folder: Path) -> Iterator[FaultResult]:
    """Compares each kind of failure with the run without MLflow."""
    whole = uninterrupted(workload, folder)
    kinds = {"that refuses": _refusing, "that hangs": _hanging, "that dies": _dying}
    for what, server in kinds.items():
        began = time.monotonic()
        here = folder / what.replace(" ", "-")
        here.mkdir()
        with server(here) as uri:
            block = workload.block(here)
            block["tracking"] |= {"mlflow": True, "tracking_uri": uri}
            ended = workload.launch(here, block=block, timeout_s=300)
        wrong = last_words(ended) if any(rank.code for rank in ended) else ""
        wrong = wrong or differences(stood(here), stood(whole)) or _warning_missing(here)
        yield FaultResult(f"an MLflow server {what}", name, uri, wrong, time.monotonic() - began)


def _warning_missing(folder: Path) -> str:
    """Checks that there is one warning, and that its command uploads the run later."""
    warnings = [event["message"] for event in events(folder, "warning") if "MLflow" in event["message"]]
    if len(warnings) != 1 or "clantune_scale.tracking.mlflow" not in warnings[0]:
        return f"warnings: {warnings}"
    store = f"sqlite:///{folder / 'later.db'}"
    command = [sys.executable, "-m", "clantune_scale.tracking.mlflow", str(folder / "run"), "--tracking-uri", store]
    sent = subprocess.run(command, capture_output=True, text=True)
    return "" if sent.returncode == 0 else f"the later upload failed: {sent.stderr[-300:]}"


@contextlib.contextmanager
def _refusing(folder: Path) -> Iterator[str]:
    """A port without a listener."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{probe.getsockname()[1]}"


@contextlib.contextmanager
def _hanging(folder: Path) -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextlib.contextmanager
def _dying(folder: Path) -> Iterator[str]:
    """A real server, killed when it knows the run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    command += ["--artifacts-destination", str(folder / "stored")]
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        _wait_for(f"{address}/health", process)
        killer = threading.Thread(target=_kill_when_it_has_a_run, args=(folder, process.pid), daemon=True)
        killer.start()
        yield address
        killer.join()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(url: str, process: subprocess.Popen) -> None:
    ends = time.monotonic() + 120
    while time.monotonic() < ends and process.poll() is None:
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError),
            urllib.request.urlopen(url, timeout=5),
        ):
            return
        time.sleep(0.2)
    raise RuntimeError(f"mlflow server does not answer on {url}")


def _kill_when_it_has_a_run(folder: Path, group: int) -> None:
    """Waits for the run's second round, then kills the server."""
    path = folder / "run" / "events.jsonl"
    while not (path.exists() and '"round_end"' in path.read_text()):
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
