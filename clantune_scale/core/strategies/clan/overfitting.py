"""Whether a clan overfits: its training loss goes on falling and its validation loss does not follow.

A run that sees its samples once never overfits. A run that sees few samples often does, and following the validation
loss misleads it: at high learning rates that loss falls fastest just before it turns, and no lower learning rate mends
the weights then (the benchmark's log, 11).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from clantune_scale.core.fitness import Fitness
from clantune_scale.core.genome import Gene
from clantune_scale.core.strategies.clan.parabola import Move

#: What the table of rounds says of a clan that overfits.
OVERFITS = "validation does not follow training: learning rates are held"
#: Share of training's progress that validation may miss. Problems that generalize stay below 0.08 from the second
#: round on, those that overfit lie above 0.25 by the time of the trial (the benchmark's log, 11).
MAX_SHARE_MISSED = 0.15
#: Factor within which a first round's two losses are taken for the same measure.
SAME_MEASURE_FACTOR = 1.25
#: The highest learning rate of a clan that overfits, over the configured one.
MAX_RATE_FACTOR = 4.0


@dataclass(frozen=True)
class OverfittingDetector:
    """Compares a training loss with a validation loss, which need not be the same measure.

    Attributes:
        initial_loss: validation loss before the first step.
        scale: what a validation loss is multiplied by to be a training loss.
    """

    initial_loss: float
    scale: float

    def overfits(self, fitness: Fitness) -> bool:
        """Whether validation misses more than ``MAX_SHARE_MISSED`` of what training has gained.

        False if the training loss is not known, or if nothing has been gained.
        """
        training, validation = fitness.training_loss, float(fitness.mean.min())
        if training is None or not math.isfinite(training) or not validation < self.initial_loss:
            return False
        gained = self.initial_loss * self.scale - training
        return gained > 0 and validation * self.scale - training > MAX_SHARE_MISSED * gained


def scale_of(fitness: Fitness) -> float | None:
    """Training over validation loss at a first round's end, before it can overfit; None if it says nothing.

    1 if they are about equal. Then both are the same measure, and they differ only in how fast they fall.
    """
    training, validation = fitness.training_loss, float(fitness.mean.min())
    if training is None or not (0 < training < math.inf and 0 < validation < math.inf):
        return None
    ratio = training / validation
    return 1.0 if 1 / SAME_MEASURE_FACTOR < ratio < SAME_MEASURE_FACTOR else ratio


def regularized(moves: Mapping[str, Move], genes: Sequence[Gene]) -> dict[str, Move]:
    """The moves of a clan that overfits: a dropout rate rises by its largest change, whatever its round says.

    The benefit of dropout shows long after the few steps of a round, in which it is only a hindrance. A validation
    loss that does not follow training is the better evidence.
    """
    raised = {gene.name: Move(gene.max_change, "overfitting") for gene in genes if gene.target == "dropout"}
    return {name: raised.get(name, move) for name, move in moves.items()}
