"""Imported once by the fork server, so that each rank starts in a fraction of a second."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import deepspeed  # noqa: E402, F401
import scipy.stats  # noqa: E402, F401
