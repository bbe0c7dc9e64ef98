"""The fast twin: many clans on one problem as one tensor program, decided by the same strategies.

:class:`~clantune_scale.reference.clan.ReferenceClan` trains one member after another and takes any module; here
all members of all clans are rows of the same tensors, and a run of a small model takes a tenth of a second.
"""

from __future__ import annotations

from clantune_scale.bench.batched.clans import BatchedClan, BatchedClans
from clantune_scale.bench.batched.matrix_optimizers import Adafactor, MuonAdamW
from clantune_scale.bench.batched.model import BatchedModel, Settings, vectorized
from clantune_scale.bench.batched.optimizers import (
    OPTIMIZERS,
    AdamW,
    Lion,
    Momentum,
    Nesterov,
    RMSprop,
    RowOptimizer,
    register,
)

__all__ = [
    "OPTIMIZERS",
    "Adafactor",
    "AdamW",
    "BatchedClan",
    "BatchedClans",
    "BatchedModel",
    "Lion",
    "Momentum",
    "MuonAdamW",
    "Nesterov",
    "RMSprop",
    "RowOptimizer",
    "Settings",
    "register",
    "vectorized",
]
