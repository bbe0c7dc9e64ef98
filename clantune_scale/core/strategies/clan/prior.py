"""A configured learning rate is a prior: what the user wrote is probably about right.

A round sees a few steps ahead and the run is long. Near the best rate a round's minimum differs from the run's by some
tenths of a log unit, either way, and members who share a displacement find the rate that they have good. So a rate that
once left the configured one for a passing reason (a warm-up, the noise of one window) has nothing that brings it back.

Belief in the configured rate is a bell over the distance from it, in log units. Who is far away has gone there by
evidence, and is left alone: most users come within a factor of two or three, and who did not is ten times off.

- A move away from the configured rate is shrunk by the non-negative garrotte (Breiman 1995),
  ``x max(0, 1 - (doubt / x)^2)``: nothing is left of one that is within the doubt, and a long one is hardly shorter.
- A lower rate is doubted half as much as a higher one, because it risks less.
- A move towards the configured rate is taken as it is. A rate above it that a round holds up by no more than the doubt
  goes back by a share of the way. One below does not: only evidence raises a rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Of the doubt, what a lower rate is met with.
DOWNWARD = 0.5


@dataclass(frozen=True)
class Prior:
    """How far a configured learning rate is believed.

    Attributes:
        width: standard deviation of the belief, in log units, above 0; 0 for no prior.
        doubt: distance, in log units, within which a round's minimum above the configured rate says nothing.
        pull: share of the way back, at the configured rate, of a round that asks for no higher rate.
    """

    width: float
    doubt: float
    pull: float

    def belief(self, distance: float) -> float:
        """1 at the configured rate, and 0 far from it."""
        return math.exp(-((distance / self.width) ** 2) / 2) if self.width else 0.0

    def shrunk(self, change: float, distance: float) -> float:
        """What is left of the move that a round asks for.

        Args:
            change: that move, in log units.
            distance: of the rate from the configured one, before the move.
        """
        towards = 0.0
        if change * distance < 0:
            towards = math.copysign(min(abs(change), abs(distance)), change)
        # A move beyond the configured rate starts there.
        away = self._garrotte(change - towards, self.belief(distance + towards))
        if away:
            return towards + away
        back = -self.pull * self.belief(distance) * max(distance, 0.0)
        return max(towards, back, key=abs)

    def _garrotte(self, change: float, belief: float) -> float:
        doubt = self.doubt * belief * (1.0 if change > 0 else DOWNWARD)
        return change * (1 - (doubt / change) ** 2) if abs(change) > doubt else 0.0
