"""The families of tasks that come with the benchmark; importing this package registers them."""

from __future__ import annotations

from clantune_scale.bench.schedules.families.tasks import (
    classification,
    contrastive,
    language,
    noisy,
    plateaus,
    reconstruction,
    regression,
    suite,
    trained,
)

__all__ = [
    "classification",
    "contrastive",
    "language",
    "noisy",
    "plateaus",
    "reconstruction",
    "regression",
    "suite",
    "trained",
]
