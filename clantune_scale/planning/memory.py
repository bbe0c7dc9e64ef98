"""Bytes of state that one rank holds: members in groups shard it over a member only, members on the line over all."""

from __future__ import annotations

from dataclasses import dataclass

from clantune_scale.planning.job import Job

_MASTER = 4


@dataclass(frozen=True)
class Copies:
    """What a run holds at most beside the live state and the guard's snapshot.

    Attributes:
        states: of a rank's whole state, in host memory: before a competition, and on the line its best end.
        arrays: of a rank's share of the fp32 weights, on the device during a round on the line.
        host_arrays: likewise, in host memory. No state is copied in such a round.
        centre: likewise, on the device while points are measured.
    """

    states: int = 0
    arrays: int = 0
    host_arrays: int = 0
    centre: int = 0


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank. Activations and buffers of collectives are not in it: a clan does not change them.

    Attributes:
        weights: that the model computes with, frozen parameters and buffers among them.
        gradients: that outlive the backward pass.
        masters: fp32 weights beside those; 0 where the weights are the masters.
        moments: optimizer state.
        average: the strategy's averaged weights.
        line: arrays of a round on the line.
        centre: the copy of the weights that is made while points on the line are measured.
        host: copies in host memory: the guard's, those of a competition or those of a round on the line.
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
        """What lies on the device while a step is taken."""
        return self.weights + self.gradients + self.masters + self.moments + self.average + self.line

    @property
    def round_end(self) -> int:
        """What lies there while members are measured: there are no gradients then."""
        return self.device - self.gradients + self.centre

    @property
    def peak(self) -> int:
        """The larger of the two."""
        return max(self.device, self.round_end)


def rank_memory(job: Job, copies: Copies | None = None) -> RankMemory:
    """What one rank of a job holds.

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
    return RankMemory(
        weights=weights,
        gradients=(shard if job.stage >= 2 else whole) * job.width,
        # Without ZeRO in fp32 the optimizer steps on the parameters themselves; every other wrapper keeps fp32 copies.
        masters=0 if job.stage == 0 and job.width == _MASTER else own,
        moments=own * job.moments,
        average=own if job.uses_ema else 0,
        line=own * copies.arrays,
        centre=own * copies.centre,
        host=state_bytes(job) * job.guards + max(state_bytes(job) * copies.states, own * copies.host_arrays),
    )


def state_bytes(job: Job) -> int:
    """One rank's share of what a clone copies and a guard keeps: masters, moments, average, frozen and buffers."""
    return job.shard * _MASTER * (1 + job.moments + job.uses_ema) + job.other_bytes
