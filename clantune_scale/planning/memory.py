"""Bytes of state that one rank holds: ZeRO shards over a member only, and that is the price of a clan."""

from __future__ import annotations

from dataclasses import dataclass

from clantune_scale.planning.job import Job

_MASTER = 4


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank. Activations and buffers of collectives are not in it: a clan does not change them.

    Attributes:
        weights: that the model computes with, frozen parameters and buffers among them.
        gradients: that outlive the backward pass.
        masters: fp32 weights beside those; 0 where the weights are the masters.
        moments: optimizer state.
        average: the strategy's averaged weights.
        host: copies in host memory: the guard's, and where a competition is rolled back, the state before it.
    """

    weights: int
    gradients: int
    masters: int
    moments: int
    average: int
    host: int

    @property
    def device(self) -> int:
        """What lies on the device."""
        return self.weights + self.gradients + self.masters + self.moments + self.average


def rank_memory(job: Job, *, rolls_back: bool = False) -> RankMemory:
    """What one rank of a job holds.

    Args:
        job: with a clan, or :meth:`Job.without_clan`.
        rolls_back: whether the strategy has phases whose training is undone.
    """
    shard = job.shard
    whole = job.num_parameters
    weights = (job.padded // job.dp if job.stage == 3 else whole) * job.width + job.other_bytes
    if job.stage == 3:
        weights += job.persistent * job.width
    gradients = (shard if job.stage >= 2 else whole) * job.width
    # Without ZeRO in fp32 the optimizer steps on the parameters themselves; every other wrapper keeps fp32 copies.
    masters = 0 if job.stage == 0 and job.width == _MASTER else shard * _MASTER
    average = shard * _MASTER if job.uses_ema else 0
    host = state_bytes(job) * (job.guards + rolls_back)
    return RankMemory(weights, gradients, masters, shard * _MASTER * job.moments, average, host)


def state_bytes(job: Job) -> int:
    """One rank's share of what a clone copies and a guard keeps: masters, moments, average, frozen and buffers."""
    return job.shard * _MASTER * (1 + job.moments + job.uses_ema) + job.other_bytes
