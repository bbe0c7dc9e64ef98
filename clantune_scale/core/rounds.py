"""The clan's clock: optimizer step to (round, phase, offset), by arithmetic only, so that one integer resumes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

#: Assumed number of rounds, of the user's length, in a run of unknown length.
USUAL_ROUNDS = 60


def expected_steps(total_steps: int | None, round_length_steps: int) -> int:
    """Optimizer steps of a run; of ``USUAL_ROUNDS`` rounds if ``total_steps`` is not known."""
    return total_steps or USUAL_ROUNDS * round_length_steps


def sees_samples_once(num_samples: float | None, *, batch_size: int, num_steps: int) -> bool:
    """Whether a run is known to see no training sample twice.

    Args:
        num_samples: of the training data, infinite for a stream without end; None if not known.
        batch_size: samples of an optimizer step.
        num_steps: optimizer steps of the run.
    """
    return num_samples is not None and batch_size * num_steps <= num_samples


class PhaseKind(str, Enum):
    """Whether members share gradients and split the data, or use their own gradients and see the same data."""

    COOPERATIVE = "cooperative"
    COMPETITIVE = "competitive"


@dataclass(frozen=True)
class Phase:
    """A stretch of optimizer steps under one rule.

    Attributes:
        kind: cooperative or competitive.
        num_steps: its length in optimizer steps, at least 1.
        keeps: whether the weights that it trained are kept; if not, each member returns to its
            phase snapshot after fitness is measured.
        batch_factor: how many times its usual share of the batch a member trains on in each step
            (``population_size`` gives it the clan's whole batch, by accumulation).
        teams: in a competitive phase, by member, the team inside which gradients are shared and data is
            disjoint; members of one team are alike and act as one with more data parallelism. None if
            every member is on its own.
    """

    kind: PhaseKind
    num_steps: int
    keeps: bool = True
    batch_factor: int = 1
    teams: tuple[int, ...] | None = None


@dataclass(frozen=True)
class RoundPlan:
    """What happens in one round, known when it starts.

    Attributes:
        index: 0 for the first round.
        start_step: optimizer steps that were done before it.
        phases: in order, without gaps.
        explores: names of the genes in which members may differ in this round.
        uses_ema: whether fitness is measured on each member's averaged weights.
        ema_window_steps: time constant of that average (0 if ``uses_ema`` is false).
        evolves: whether selection and reproduction follow the evaluation.
        slopes: names of learning-rate genes whose slopes are measured at its end (``core.fitness.Slopes``).
    """

    index: int
    start_step: int
    phases: tuple[Phase, ...]
    explores: tuple[str, ...] = ()
    uses_ema: bool = False
    ema_window_steps: int = 0
    evolves: bool = True
    slopes: tuple[str, ...] = ()

    @property
    def num_steps(self) -> int:
        """Optimizer steps of all its phases."""
        return sum(phase.num_steps for phase in self.phases)

    @property
    def end_step(self) -> int:
        """Optimizer steps that are done at its end."""
        return self.start_step + self.num_steps


@dataclass(frozen=True)
class Position:
    """Where a step lies: its round, its phase in the round, its offset in the phase."""

    step: int
    plan: RoundPlan
    phase_index: int
    offset: int

    @property
    def phase(self) -> Phase:
        """The phase that the step lies in."""
        return self.plan.phases[self.phase_index]

    @property
    def starts_phase(self) -> bool:
        """Whether the step is its phase's first."""
        return self.offset == 0

    @property
    def starts_round(self) -> bool:
        """Whether the step is its round's first."""
        return self.offset == 0 and self.phase_index == 0

    @property
    def ends_phase(self) -> bool:
        """Whether the step is its phase's last."""
        return self.offset == self.phase.num_steps - 1

    @property
    def ends_round(self) -> bool:
        """Whether the step is its round's last."""
        return self.ends_phase and self.phase_index == len(self.plan.phases) - 1


class RoundClock:
    """Finds the position of any optimizer step.

    Args:
        plan_round: (round index, start step) to that round's plan; must be a pure function, because
            the clock calls it again after a resume and expects the same answer.
        first_step: optimizer steps that were done before the first round.
    """

    def __init__(self, plan_round: Callable[[int, int], RoundPlan], first_step: int = 0) -> None:
        self._plan_round = plan_round
        self.first_step = first_step
        self._plans: list[RoundPlan] = []
        self._teams: tuple[int, ...] | None = None

    def regroup(self, index: int, teams: tuple[int, ...] | None) -> None:
        """From round ``index`` on, members compete in these teams; plans already made for those rounds are discarded.

        The length of a round follows only from the step. Teams follow from fitness: they are the only part of a plan
        that a decision changes (``Population.teams``). One team of all members is planned as cooperation.

        Args:
            index: of the first round that has them.
            teams: by member; None leaves competitive phases as the strategy plans them.
        """
        if index:
            self.round(index - 1)  # earlier rounds keep their teams
        del self._plans[index:]
        self._teams = teams

    def resume(self, past: Sequence[RoundPlan], teams: tuple[int, ...] | None, *, first_step: int = 0) -> None:
        """Goes on after finished rounds, whose plans are taken as given: their teams and lengths may differ.

        Args:
            past: all of them, from the first round on.
            teams: of the round that follows.
            first_step: at which the first round started.
        """
        self._plans, self._teams, self.first_step = list(past), teams, first_step

    def round(self, index: int) -> RoundPlan:
        """The plan of round ``index``."""
        while len(self._plans) <= index:
            start_step = self._plans[-1].end_step if self._plans else self.first_step
            plan = self._plan_round(len(self._plans), start_step)
            if not plan.phases or any(phase.num_steps < 1 for phase in plan.phases):
                raise ValueError(f"round {plan.index} at step {start_step} was planned with an empty phase: {plan}")
            self._plans.append(plan if self._teams is None else _grouped(plan, self._teams))
        return self._plans[index]

    def at(self, step: int) -> Position:
        """The position of the step that follows ``step`` completed ones."""
        if step < self.first_step:
            raise ValueError(f"steps count from {self.first_step}, not from {step}")
        index = len(self._plans)
        while index > 0 and self.round(index - 1).end_step > step:
            index -= 1
        while self.round(index).end_step <= step:
            index += 1
        plan = self.round(index)
        offset = step - plan.start_step
        for phase_index, phase in enumerate(plan.phases):
            if offset < phase.num_steps:
                return Position(step, plan, phase_index, offset)
            offset -= phase.num_steps
        raise AssertionError("unreachable: a round's phases cover its steps")


def _grouped(plan: RoundPlan, teams: tuple[int, ...]) -> RoundPlan:
    """The plan with its competitive phases in ``teams``."""
    alone = len(set(teams)) == 1
    rule = {"kind": PhaseKind.COOPERATIVE} if alone else {"teams": teams}
    phases = (replace(p, **rule) if p.kind is PhaseKind.COMPETITIVE else p for p in plan.phases)
    return replace(plan, phases=tuple(phases))
