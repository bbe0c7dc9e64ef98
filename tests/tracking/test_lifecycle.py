"""Every way out of a process, each in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

from clantune_scale.tracking.lifecycle import Lifecycle

PREAMBLE = """
import os, signal, sys
from clantune_scale.tracking.lifecycle import Lifecycle
"""


def run(body: str) -> tuple[int, str, str]:
    code = PREAMBLE + textwrap.dedent(body)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


SAY = "hooks = Lifecycle(lambda status: (print(status, flush=True), hooks.release()))\n"


@pytest.mark.parametrize(
    ("end", "returncode", "status"),
    [
        ("", 0, "FINISHED"),
        ("raise ValueError('boom')", 1, "FAILED"),
        ("raise KeyboardInterrupt", -signal.SIGINT, "KILLED"),
        ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, "KILLED"),
    ],
)
def test_ways_out(end, returncode, status):
    code, out, err = run(SAY + end)
    assert out == f"{status}\n"
    # An interrupted interpreter ends by the signal or with 130, as the platform has it.
    assert code == returncode or (returncode == -signal.SIGINT and code == 130)
    assert ("boom" in err) == ("boom" in end)


def test_the_handler_that_was_there_still_runs():
    code, out, _ = run(
        """
        signal.signal(signal.SIGTERM, lambda number, frame: (print("theirs", flush=True), os._exit(7)))
        hooks = Lifecycle(lambda status: print(status, flush=True))
        os.kill(os.getpid(), signal.SIGTERM)
        """
    )
    assert (code, out) == (7, "KILLED\ntheirs\n")


def test_a_close_that_fails_does_not_keep_the_process_alive():
    code, _, _ = run(
        """
        hooks = Lifecycle(lambda status: 1 / 0)
        os.kill(os.getpid(), signal.SIGTERM)
        print("still here")
        """
    )
    assert code == -signal.SIGTERM


def test_release_puts_back_what_was_found():
    hook, handler = sys.excepthook, signal.getsignal(signal.SIGTERM)
    lifecycle = Lifecycle(lambda status: None)
    assert sys.excepthook != hook and signal.getsignal(signal.SIGTERM) != handler
    lifecycle.release()
    assert sys.excepthook == hook and signal.getsignal(signal.SIGTERM) == handler


def test_release_leaves_a_hook_that_came_later():
    hook = sys.excepthook
    lifecycle = Lifecycle(lambda status: None)

    def later(*error):
        return None

    sys.excepthook = later
    lifecycle.release()
    assert sys.excepthook is later
    sys.excepthook = hook
