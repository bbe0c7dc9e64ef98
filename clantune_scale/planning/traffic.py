"""The collectives of a run: exact in elements, and in bytes on the wire of a ring.

Collectives of a few numbers (norms, masks, decisions) are left out. The tests count what is predicted here in
real runs, for ZeRO 0 to 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from clantune_scale.core.rounds import PhaseKind, RoundPlan
from clantune_scale.planning.job import Job
from clantune_scale.planning.memory import state_bytes
from clantune_scale.planning.walk import Walk

#: clan: all (member, data) ranks; member: the ranks of one model; replica_group: one rank of each model.
Scope = Literal["clan", "member", "replica_group"]
Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "send"]


@dataclass(frozen=True)
class Collective:
    """One or more calls that together move a whole tensor.

    Attributes:
        operation: what is done.
        scope: among whom.
        elements: of the whole tensor: what is reduced, the gathered result, what is scattered, what is sent.
        width: bytes of an element.
    """

    operation: Operation
    scope: Scope
    elements: int
    width: int

    @property
    def payload_bytes(self) -> int:
        """Of the whole tensor."""
        return self.elements * self.width

    def wire_bytes(self, job: Job) -> float:
        """What one rank sends, by a ring (Patarasuk and Yuan 2009)."""
        ranks = ranks_in(self.scope, job)
        if self.operation == "send":
            return float(self.payload_bytes)
        passes = 2 if self.operation == "all_reduce" else 1
        return passes * (ranks - 1) / ranks * self.payload_bytes


def ranks_in(scope: Scope, job: Job) -> int:
    """How many ranks a scope has."""
    return {"clan": job.world_size, "member": job.dp, "replica_group": job.population_size}[scope]


def step_traffic(job: Job, *, cooperates: bool = True, has_diagnostics: bool = False) -> Iterator[Collective]:
    """One optimizer step.

    Args:
        job: with a clan; :meth:`Job.without_clan` gives plain data parallelism's.
        cooperates: whether members share gradients.
        has_diagnostics: whether it is the last step of a phase, in which members' own gradients are compared with
            the clan's.
    """
    crosses = cooperates and job.population_size > 1
    if job.stage == 3:
        yield from _sharded_step(job, crosses=crosses)
        return
    # ZeRO 2 reduces every micro-batch; the others once, when all are done.
    reductions = job.accumulation if job.stage == 2 else 1
    gradients = job.num_parameters * reductions
    yield Collective("all_reduce", "clan" if crosses else "member", gradients, job.width)
    if has_diagnostics and crosses:
        yield Collective("all_reduce", "member", gradients, job.width)
    yield from _refresh(job)


def evaluation_traffic(job: Job, *, averaged: bool, points: int = 1) -> Iterator[Collective]:
    """Evaluations on the validation window, and their losses.

    Args:
        job: what is trained.
        averaged: whether other weights than the live ones are measured.
        points: how many are written into the model, one after the other, before the live ones return.
    """
    if averaged or points > 1:
        for _ in range(points + 1):
            yield from _refresh(job)
    for _ in range(points):
        if job.stage == 3:
            # A model that is small enough stays gathered from one batch to the next.
            passes = 1 if _is_kept(job) else job.num_eval_batches // job.dp
            yield Collective("all_gather", "member", (job.padded - job.persistent) * passes, job.width)
        if job.dp > 1:
            yield Collective("all_gather", "member", job.num_eval_batches, 8)
    if not job.points:
        yield Collective("all_gather", "replica_group", job.num_eval_batches * job.population_size, 8)


def drift_traffic(job: Job) -> Iterator[Collective]:
    """The distance between members in groups, once a round: the fp32 weights over the replica group."""
    if not job.points:
        yield Collective("all_reduce", "replica_group", job.shard, 4)


def round_end_traffic(job: Job, plan: RoundPlan | None = None) -> Iterator[Collective]:
    """What follows a round's last step, clones left out.

    Args:
        job: what is trained.
        plan: of the round; one in which members differ while they cooperate if None.
    """
    if not job.points:
        yield from evaluation_traffic(job, averaged=job.uses_ema)
        yield from drift_traffic(job)
        return
    averaged = job.uses_ema
    evaluations = job.points if plan is None else job.evaluations(plan)
    if plan is not None and plan.phases[-1].kind is PhaseKind.COMPETITIVE:
        for _ in range(evaluations):  # each turn is measured, and the weights go back or to the best
            yield from evaluation_traffic(job, averaged=averaged)
            yield from _refresh(job)
        return
    yield from evaluation_traffic(job, averaged=averaged, points=evaluations)
    if evaluations > 1:
        yield from _refresh(job)  # the weights go to the best point


def clone_traffic(job: Job) -> Iterator[Collective]:
    """What a rank sends on to the next in a clone's chain, and what a recipient does then; nothing on the line."""
    if job.points:
        return
    yield Collective("send", "replica_group", state_bytes(job), 1)
    yield from _refresh(job)


def crossing_bytes(collectives: Iterable[Collective], job: Job) -> float:
    """Bytes that leave a member, over all its ranks; a ring over the clan crosses each boundary once."""
    total = 0.0
    for collective in collectives:
        if collective.scope == "replica_group":
            total += collective.wire_bytes(job) * job.dp
        elif collective.scope == "clan":
            total += collective.wire_bytes(job)
    return total


def mean_round_bytes(job: Job, walk: Walk) -> tuple[float, float]:
    """A run's bytes (inside a member, out of it), divided by its rounds.

    Each round that ends does so with an evaluation, and is taken to end with a clone.
    """
    totals = []
    for bytes_of in (inside_bytes, crossing_bytes):
        total = walk.num_ended * bytes_of(clone_traffic(job), job)
        total += sum(bytes_of(round_end_traffic(job, plan), job) for plan in walk.ended)
        for phase, taken in walk.phases:
            sharing, steps = job.in_phase(phase), taken * job.turns(phase, taken)
            looks = int(taken == phase.num_steps)
            total += (steps - looks) * bytes_of(step_traffic(sharing), sharing)
            total += looks * bytes_of(step_traffic(sharing, has_diagnostics=True), sharing)
        totals.append(total / walk.num_rounds)
    return totals[0], totals[1]


def inside_bytes(collectives: Iterable[Collective], job: Job) -> float:
    """Bytes that ranks of a member send to each other, over all its ranks."""
    total = 0.0
    for collective in collectives:
        if collective.scope == "member":
            total += collective.wire_bytes(job) * job.dp
        elif collective.scope == "clan":
            total += collective.wire_bytes(job) * (job.dp - 1)
    return total


def _sharded_step(job: Job, *, crosses: bool) -> Iterator[Collective]:
    partitioned = job.padded - job.persistent
    if partitioned:
        # Once for every micro-batch, and again for its backward pass if the model is too large to be kept: an upper
        # bound, because a part of it is. Models of that size were not counted.
        passes = 1 if _is_kept(job) else 2
        yield Collective("all_gather", "member", passes * partitioned * job.accumulation, job.width)
    yield Collective("reduce_scatter", "member", job.padded * job.accumulation, job.width)
    if crosses:
        yield Collective("all_reduce", "replica_group", job.padded // job.dp * job.accumulation, job.width)
    yield from _refresh(job)


def _is_kept(job: Job) -> bool:
    return job.padded - job.persistent <= job.keeps


def _refresh(job: Job) -> Iterator[Collective]:
    """The model's weights from the masters."""
    if job.stage in (1, 2):
        yield Collective("all_gather", "member", job.padded, job.width)
    elif job.stage == 3 and job.persistent:
        yield Collective("all_gather", "member", job.persistent, job.width)
