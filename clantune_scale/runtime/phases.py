"""The phase manager: one flag that the gradient hooks read, changed only between optimizer steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from clantune_scale.core.rounds import PhaseKind, Position, RoundClock, RoundPlan


class PhaseManager:
    """Tracks the run's position and whether members share gradients there.

    The flag is constant inside an accumulation window: only :meth:`advance` moves it, and the clan calls that once
    after each optimizer step.

    Args:
        clock: finds the position of a step.
        step: optimizer steps that are done.
    """

    def __init__(self, clock: RoundClock, step: int = 0) -> None:
        self.clock = clock
        self.position = clock.at(step)
        self._is_suspended = False

    @property
    def is_sharing(self) -> bool:
        """Whether gradients are averaged over all members in the next step."""
        return self.position.phase.kind is PhaseKind.COOPERATIVE and not self._is_suspended

    @property
    def first_step(self) -> int:
        """At which the first round started."""
        return self.clock.first_step

    @property
    def averaged_before(self) -> bool:
        """Whether the round before measured averaged weights; true for the first round, which restarts none."""
        index = self.position.plan.index
        return index == 0 or self.clock.round(index - 1).uses_ema

    def team(self, member: int, population_size: int) -> tuple[int, ...]:
        """The members with whom ``member`` averages its gradients in the next step, including itself."""
        teams = self.position.phase.teams
        if self.is_sharing:
            return tuple(range(population_size))
        if teams is None or self._is_suspended:
            return (member,)
        return tuple(other for other, team in enumerate(teams) if team == teams[member])

    def regroup(self, index: int, teams: tuple[int, ...] | None) -> None:
        """From round ``index`` on, which has not begun, members compete in ``teams``."""
        self.clock.regroup(index, teams)
        self.position = self.clock.at(self.position.step)

    def resume(
        self, step: int, past: Sequence[RoundPlan], teams: tuple[int, ...] | None, *, first_step: int = 0
    ) -> None:
        """Moves to ``step`` completed optimizer steps, after finished rounds (``RoundClock.resume``)."""
        self.clock.resume(past, teams, first_step=first_step)
        self.position = self.clock.at(step)

    def begin(self, step: int) -> None:
        """Begins a run at ``step`` completed optimizer steps, whatever was planned before."""
        self.clock.resume((), None, first_step=step)
        self.position = self.clock.at(step)

    def rewind(self, step: int) -> None:
        """Moves back to ``step`` completed optimizer steps, in the present round."""
        self.position = self.clock.at(step)

    def advance(self) -> Position:
        """Moves on by one optimizer step; returns the position that was just completed."""
        completed = self.position
        self.position = self.clock.at(completed.step + 1)
        return completed

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, no gradient is shared, whatever the phase; on exit the flag is what it was."""
        before = self._is_suspended
        self._is_suspended = True
        try:
            yield
        finally:
            self._is_suspended = before
