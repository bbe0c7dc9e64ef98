"""Imported once by the fork server of these tests."""

import scipy.stats  # noqa: F401
import torch.nn.parallel  # noqa: F401

import clantune_scale.backends.torch.attach
import clantune_scale.checkpoint.durable  # noqa: F401
import tests.backends.families.ddp  # noqa: F401
