"""Runs a script with Megatron-core bridged to the CPU: megatron_on_cpu.py SCRIPT ARGUMENTS..."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests import megatron_shim

if __name__ == "__main__":
    torch.set_num_threads(1)
    megatron_shim.install()
    del sys.argv[0]
    # As Python does for a script: modules beside it are found.
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
