"""Bytes of state that one rank holds: a shard over its member's ranks, or over all ranks with members on the line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clantune_scale.config.schema import LineConfig
from clantune_scale.core.genome import Gene
from clantune_scale.core.line import DECAY, RATE
from clantune_scale.core.rounds import PhaseKind, RoundPlan
from clantune_scale.planning.job import Job
from clantune_scale.planning.walk import Walk

_MASTER = 4


@dataclass(frozen=True)
class Copies:
    """The most copies that a rank holds at once, beside the live state and the rollback snapshot.

    Attributes:
        states: of its whole state, in host memory: a phase snapshot; with turns on the line the best end too.
        arrays: of its shard of the fp32 weights, on the device during a round on the line.
        host_arrays: of its shard of the fp32 weights, in host memory. A round with such copies has no phase snapshot.
        centre: of its shard of the fp32 weights, on the device while points on the line are measured.
    """

    states: int = 0
    arrays: int = 0
    host_arrays: int = 0
    centre: int = 0


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank, without activations and buffers of collectives: a clan does not change those.

    Attributes:
        weights: with which the model computes; frozen parameters and buffers are included.
        gradients: that outlive the backward pass.
        masters: fp32 weights beside ``weights``; 0 if the weights are the masters.
        moments: optimizer state.
        average: the strategy's averaged weights, unless they lie in host memory.
        line: the arrays of a round on the line.
        centre: the copy of the weights that exists while points on the line are measured.
        host: in host memory: the rollback snapshot, an average that lies there, and the most that a competition or a
            round on the line adds.
    """

    weights: int
    gradients: int
    masters: int
    moments: int
    average: int
    line: int
    centre: int
    host: int

    @property
    def device(self) -> int:
        """Bytes on the device while a step is taken."""
        return self.weights + self.gradients + self.masters + self.moments + self.average + self.line

    @property
    def round_end(self) -> int:
        """Bytes on the device while members are measured: DeepSpeed holds no gradients then."""
        return self.device - self.gradients + self.centre

    @property
    def round_end_in_loop(self) -> int:
        """Likewise in a loop of the user's own, whose gradients are alive inside ``optimizer.step()``."""
        return self.device + self.centre

    @property
    def peak(self) -> int:
        """The larger of the first two."""
        return max(self.device, self.round_end)


def rank_memory(job: Job, copies: Copies | None = None) -> RankMemory:
    """Bytes that one rank of a job holds.

    Args:
        job: with a clan, or :meth:`Job.without_clan`.
        copies: that it makes; none if None.
    """
    copies = copies or Copies()
    shard, whole = job.shard, job.num_parameters
    weights = (job.padded // job.dp if job.stage == 3 else whole) * job.width + job.other_bytes
    if job.stage == 3:
        weights += job.persistent * job.width
    own = shard * _MASTER
    average, is_on_host = own * job.uses_ema, job.host_average_every is not None
    most_copied = max(state_bytes(job) * copies.states, own * copies.host_arrays)
    return RankMemory(
        weights=weights,
        gradients=(shard if job.stage >= 2 else whole) * job.width,
        # In fp32 without ZeRO the optimizer updates the parameters themselves. All other wrappers keep fp32 copies.
        masters=0 if job.stage == 0 and job.width == _MASTER else own,
        moments=own * job.moments,
        average=0 if is_on_host else average,
        line=own * copies.arrays,
        centre=own * copies.centre,
        host=state_bytes(job) * job.guards + average * is_on_host + most_copied,
    )


def state_bytes(job: Job) -> int:
    """One rank's share of the state that a clone copies and a rollback snapshot keeps.

    It is masters, moments, averaged weights, frozen parameters and buffers.
    """
    return job.shard * _MASTER * (1 + job.moments + job.uses_ema) + job.other_bytes


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
