"""The run that the strategies' tests plan for, and losses to feed them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Gene
from clantune_scale.core.strategies import RunFacts

LR = Gene("lr", relative=True)
WEIGHT_DECAY = Gene("weight_decay", relative=True, max_change=0.1)
DROPOUT = Gene("dropout", kind="specialized", scale="linear", bounds=(0.0, 0.5), initial=0.1, step_size=0.03)
FACTS = RunFacts(4, (LR,), seed=7, round_length_steps=20, duty_cycle=0.1, total_steps=1000)


def facts(**changes) -> RunFacts:
    return replace(FACTS, **changes)


def fitness_of(losses, training_loss=None) -> Fitness:
    """Two batches per member, 0.1 either side of the given mean."""
    losses = np.asarray(losses, dtype=float)
    return Fitness.from_losses(np.stack([losses - 0.1, losses + 0.1], axis=1), training_loss=training_loss)
