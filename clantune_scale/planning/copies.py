"""How many copies of its state a rank makes in a run: for a competition, and for rounds on the line."""

from __future__ import annotations

from collections.abc import Sequence

from clantune_scale.config.schema import LineConfig
from clantune_scale.core.genome import Gene
from clantune_scale.core.line import DECAY, RATE
from clantune_scale.core.rounds import PhaseKind, RoundPlan
from clantune_scale.planning.job import Job
from clantune_scale.planning.memory import Copies
from clantune_scale.planning.walk import Walk


def copies_of(job: Job, walk: Walk, genes: Sequence[Gene], line: LineConfig) -> Copies:
    """The copies of the round that makes most of each kind.

    Args:
        job: what is trained.
        walk: through the run's rounds.
        genes: of the run.
        line: how members on the line are stored.
    """
    states = max((_states(job, plan) for plan in walk.rounds), default=0)
    if not job.points:
        return Copies(states)
    moves, is_on_host = line.go_on_from == "fittest", line.store == "host"
    rounds = [_arrays(plan, genes, moves=moves) for plan in walk.rounds]
    most_saved, most = max(saved for saved, _ in rounds), max(saved + sums for saved, sums in rounds)
    if not most:
        return Copies(states)
    if is_on_host:
        # Sums grow in every step, so they stay on the device.
        return Copies(states, arrays=max(sums for _, sums in rounds), host_arrays=most_saved + 1)
    return Copies(states, arrays=most, centre=1)


def _states(job: Job, plan: RoundPlan) -> int:
    """Of the whole state: before a phase that is undone; and before turns, with the best end if one is kept."""
    most = 0
    for phase in plan.phases:
        if phase.kind is PhaseKind.COMPETITIVE and job.turns(phase) > 1:
            most = max(most, 1 + phase.keeps)
        elif not phase.keeps:
            most = max(most, 1)
    return most


def _arrays(plan: RoundPlan, genes: Sequence[Gene], *, moves: bool) -> tuple[int, int]:
    """(saved at the round's start, added up in its steps) copies of the weights; the averages have their own."""
    if any(phase.kind is PhaseKind.COMPETITIVE for phase in plan.phases):
        return 0, 0
    targets = {gene.target for gene in genes if gene.name in plan.explores}
    each = moves + plan.uses_ema
    return each * (RATE in targets), each * (DECAY in targets)
