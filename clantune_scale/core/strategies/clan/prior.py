"""A configured learning rate is a prior: what the user wrote is probably about right.

A round sees a few steps ahead and the run is long. Near the best rate a round's minimum differs from the run's by some
tenths of a log unit, either way, and members who share a displacement find the rate that they have good. So a rate that
once left the configured one for a passing reason (a warm-up, the noise of one window) has nothing that brings it back.

Belief in the configured rate is a bell over the distance from it, in log units. Who is far away has gone there by
evidence, and is left alone: most users come within a factor of two or three, and who did not is ten times off.

- A move away from the configured rate is shrunk by the non-negative garrotte (Breiman 1995),
  ``x max(0, 1 - (doubt / x)^2)``: nothing is left of one that is within the doubt, and a long one is hardly shorter.
- A lower rate is doubted half as much as a higher one, because it risks less.
- A doubted rise is not forgotten. If rounds go on to ask for one, what they were not given adds up until it is beyond
  the doubt. One that asks for a lower rate ends that.
- A move towards the configured rate is taken as it is. A rate above it that a round holds up by no more than the doubt
  goes back by a share of the way. One below does not: only evidence raises a rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Of the doubt, what a lower rate is met with.
DOWNWARD = 0.5
#: Of a doubted rise, what is remembered in the next round. Rounds that ask for 0.06 each then reach a doubt of 0.3.
REMEMBERED = 0.8


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

    def shrunk(self, change: float, distance: float, doubted: float = 0.0) -> tuple[float, float]:
        """What is left of the move that a round asks for, and what to remember of the rest.

        Args:
            change: that move, in log units.
            distance: of the rate from the configured one, before the move.
            doubted: what is remembered of the rises that earlier rounds asked for; at least 0.
        """
        doubted = doubted if change > 0 else 0.0
        towards = 0.0
        if change * distance < 0:
            towards = math.copysign(min(abs(change), abs(distance)), change)
        # A move beyond the configured rate starts there.
        beyond = change - towards
        away = self._garrotte(beyond + doubted, self.belief(distance + towards)) if beyond else 0.0
        if not away:
            back = -self.pull * self.belief(distance) * max(distance, 0.0)
            towards = max(towards, back, key=abs)
        taken = towards + away
        rest = change + doubted - taken if change > 0 and taken >= 0 and self.width else 0.0
        return taken, REMEMBERED * rest

    def _garrotte(self, change: float, belief: float) -> float:
        doubt = self.doubt * belief * (1.0 if change > 0 else DOWNWARD)
        return change * (1 - (doubt / change) ** 2) if abs(change) > doubt else 0.0
