"""Imported once by the fork server, so that each rank starts in a fraction of a second.

DeepSpeed imports torch's compiler when it makes its first engine (1,500 modules, 5 s): it is preloaded too.
"""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer
import deepspeed.runtime.zero.stage3  # noqa: F401
import scipy.stats  # noqa: F401
import torch._inductor.compile_fx
import torch.onnx  # noqa: F401
