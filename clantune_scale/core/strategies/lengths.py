"""The ends of rounds and the phases in them: the arithmetic that all strategies share."""

from __future__ import annotations

from clantune_scale.core.rounds import Phase, PhaseKind


def round_end(start_step: int, length_steps: int, boundary_step: int | None) -> int:
    """The step at which a round of about ``length_steps`` ends.

    No round crosses ``boundary_step`` (for example, the end of the run). A remainder before it that is shorter than
    half a round is added to the round, because a round that short could not be measured.

    Args:
        start_step: optimizer steps done before the round.
        length_steps: the length it should have, at least 1.
        boundary_step: None or a passed step if there is no boundary.
    """
    end = start_step + length_steps
    if boundary_step is not None and start_step < boundary_step and boundary_step - end < length_steps / 2:
        return boundary_step
    return end


def competitive_steps(length_steps: int, duty_cycle: float) -> int:
    """Steps of a round's competitive phase: its share of the round, at least one step and not all of them.

    0 if ``duty_cycle`` is 0 or the round has a single step.
    """
    if duty_cycle == 0 or length_steps < 2:
        return 0
    return min(max(round(duty_cycle * length_steps), 1), length_steps - 1)


def phases(length_steps: int, num_competitive: int, *, keeps: bool) -> tuple[Phase, ...]:
    """A round that cooperates, then competes for its last ``num_competitive`` steps (none: cooperates throughout)."""
    cooperative = Phase(PhaseKind.COOPERATIVE, length_steps - num_competitive)
    if num_competitive == 0:
        return (cooperative,)
    return cooperative, Phase(PhaseKind.COMPETITIVE, num_competitive, keeps=keeps)
