"""Bytes of state that one rank holds. ZeRO shards over a member's ranks only, and that is the price of a clan."""

from __future__ import annotations

from dataclasses import dataclass

from clantune_scale.planning.job import Job

_MASTER = 4


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank, without activations and buffers of collectives: a clan does not change those.

    Attributes:
        weights: with which the model computes; frozen parameters and buffers are included.
        gradients: that outlive the backward pass.
        masters: fp32 weights beside ``weights``; 0 if the weights are the masters.
        moments: optimizer state.
        average: the strategy's averaged weights.
        host: copies in host memory: the rollback snapshot, and the phase snapshot if a phase is rolled back.
    """

    weights: int
    gradients: int
    masters: int
    moments: int
    average: int
    host: int

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.masters + self.moments + self.average


def rank_memory(job: Job, *, rolls_back: bool = False) -> RankMemory:
    """Bytes that one rank of a job holds.

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
    # In fp32 without ZeRO the optimizer updates the parameters themselves. All other wrappers keep fp32 copies.
    masters = 0 if job.stage == 0 and job.width == _MASTER else shard * _MASTER
    average = shard * _MASTER if job.uses_ema else 0
    host = state_bytes(job) * (job.guards + rolls_back)
    return RankMemory(weights, gradients, masters, shard * _MASTER * job.moments, average, host)


def state_bytes(job: Job) -> int:
    """One rank's share of the state that a clone copies and a rollback snapshot keeps.

    It is masters, moments, averaged weights, frozen parameters and buffers.
    """
    return job.shard * _MASTER * (1 + job.moments + job.uses_ema) + job.other_bytes
