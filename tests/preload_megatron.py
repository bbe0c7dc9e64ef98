"""Imported once by the fork server of Megatron-core's tests: the import takes eight seconds on a cold disk."""

# ruff: noqa: E402 (the filter stands before what it filters)

import os
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
# What Megatron-core says where its CUDA extensions are not installed.
warnings.filterwarnings("ignore", "(Transformer Engine and )?Apex (is|are) not installed", UserWarning)

import megatron.core.distributed
import megatron.core.models.gpt
import megatron.core.models.gpt.gpt_layer_specs
import megatron.core.num_microbatches_calculator
import megatron.core.optimizer
import megatron.core.optimizer_param_scheduler
import megatron.core.pipeline_parallel  # noqa: F401
import scipy.stats  # noqa: F401
import torch._inductor.compile_fx  # noqa: F401

import clantune_scale.backends.megatron.attach  # noqa: F401
