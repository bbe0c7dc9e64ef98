"""The actions of faults: on the process, its numbers and its disk."""

from __future__ import annotations

import errno
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules import module as modules

#: File that ends a ``wait``.
GO_ON = "go-on"
#: Printed by an action that changed a number: a run that passes proves nothing if the fault was never injected.
INJECTED = "a fault was injected"


class InjectedError(Exception):
    """An exception in the user's code, raised on purpose."""


def _raise(clan: Any) -> None:
    raise InjectedError("an injected error")


def _signal(number: int) -> Callable[[Any], None]:
    return lambda clan: os.kill(os.getpid(), number)


def _spoil_weights(value: float) -> Callable[[Any], None]:
    """Overwrites one tensor of this rank's fp32 weights, as a broken memory chip would."""

    def spoil(clan: Any) -> None:
        clan.backend.masters()[0].data.fill_(value)
        _tell()

    return spoil


def _spoil_activations(value: float) -> Callable[[Any], None]:
    """Changes the output of the next module once: the next loss and all its gradients are not finite."""

    def spoil(clan: Any) -> None:
        def hook(called: Any, inputs: Any, outputs: Any) -> Any:
            found = _first_floating(outputs)
            if found is None or not torch.is_grad_enabled():
                return None
            handle.remove()
            _tell()
            return _replaced(outputs, found, found * value)

        handle = modules.register_module_forward_hook(hook)

    return spoil


def _spoil_gradient(value: float) -> Callable[[Any], None]:
    """Changes the gradient of the next module's output once; its loss stays finite."""

    def spoilt(gradient: torch.Tensor) -> torch.Tensor:
        _tell()
        return gradient * value

    def spoil(clan: Any) -> None:
        def hook(called: Any, inputs: Any, outputs: Any) -> None:
            found = _first_floating(outputs)
            if found is not None and found.requires_grad:
                handle.remove()
                found.register_hook(spoilt)

        handle = modules.register_module_forward_hook(hook)

    return spoil


def _tell() -> None:
    print(INJECTED, file=sys.stderr, flush=True)


def _first_floating(outputs: Any) -> torch.Tensor | None:
    values = outputs if isinstance(outputs, tuple | list) else (outputs,)
    return next((value for value in values if torch.is_tensor(value) and value.is_floating_point()), None)


def _replaced(outputs: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    if not isinstance(outputs, tuple | list):
        return new
    return type(outputs)(new if value is old else value for value in outputs)


def _spoil_transfers(times: int) -> Callable[[Any], None]:
    """Changes one number that this rank receives, in the first ``times`` transfers."""

    def spoil(clan: Any) -> None:
        transport = clan.transfers.transport
        move, left = transport.move, [times]

        def moved(state: Any, route: Any) -> str | None:
            complaint = move(state, route)
            if route.before is not None and left[0]:
                left[0] -= 1
                _tell()
                state.tensors[0][1].view(-1)[0] += 1
            return complaint

        transport.move = moved

    return spoil


def _filler(clan: Any) -> Path:
    return clan.recorder.run_dir.parent / "filler"


def _fill_disk(clan: Any) -> None:
    """Fills the file system of the runs to the last byte, and the last block of the events file."""
    with open(_filler(clan), "ab", buffering=0) as file:
        for size in (1 << 16, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    block = "x" * os.statvfs(clan.recorder.run_dir).f_bsize
    clan.recorder.tracking.emit("warning", clan.phases.position.step, message=f"the disk was filled on purpose {block}")


def _free_disk(clan: Any) -> None:
    _filler(clan).unlink()


def _wait(clan: Any) -> None:
    """Waits until the file ``go-on`` exists beside the runs."""
    while not (clan.recorder.run_dir.parent / GO_ON).exists():
        time.sleep(0.05)


#: By name; each gets the clan of its process, or None before there is one.
ACTIONS: dict[str, Callable[[Any], None]] = {
    "kill": _signal(signal.SIGKILL),
    "stop": _signal(signal.SIGSTOP),
    "terminate": _signal(signal.SIGTERM),
    "raise": _raise,
    "wait": _wait,
    "nan-loss": _spoil_activations(math.nan),
    "inf-loss": _spoil_activations(math.inf),
    "nan-gradient": _spoil_gradient(math.nan),
    "inf-gradient": _spoil_gradient(math.inf),
    "nan-weights": _spoil_weights(math.nan),
    "inf-weights": _spoil_weights(math.inf),
    "spoil-transfer": _spoil_transfers(1),
    "spoil-transfers": _spoil_transfers(2),
    "fill-disk": _fill_disk,
    "free-disk": _free_disk,
}
