"""What DeepSpeed does at its first start that no user of a clan could want."""

from __future__ import annotations

import warnings

import deepspeed


def quieten() -> None:
    """Keeps DeepSpeed from compiling and from warning of what neither of us can change. Call it before it starts."""
    # Its shared-memory collectives for the CPU: they need a C++ compiler and 20 s at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed 0.19 calls names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
