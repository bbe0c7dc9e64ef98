"""Seconds and samples of a whole run, round by round as the strategy plans it, against plain data parallelism."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from clantune_scale.core.rounds import Phase, PhaseKind
from clantune_scale.planning.hardware import Hardware
from clantune_scale.planning.job import Job
from clantune_scale.planning.measured import Measured
from clantune_scale.planning.memory import Copies, state_bytes
from clantune_scale.planning.traffic import (
    Collective,
    clone_traffic,
    drift_traffic,
    evaluation_traffic,
    step_traffic,
)
from clantune_scale.planning.walk import Walk

# Operations per weight and token: a forward pass 2, a backward pass 4 (Kaplan et al. 2020).
_FORWARD, _TRAINING = 2, 6


@dataclass(frozen=True)
class Pace:
    """Seconds of each part of a run; known only from hardware or a measured run.

    Attributes:
        plain_step_s: a step of plain data parallelism on the same ranks.
        step_s: one of a phase, and of one turn.
        evaluation_s: the validation window, once.
        transfer_s: clones, copies and the comparison of members at a round's end.
    """

    plain_step_s: float
    step_s: Callable[[Phase], float]
    evaluation_s: float
    transfer_s: float


def pace_of(
    job: Job, hardware: Hardware | None, measured: Measured | None, copies: Copies | None = None
) -> Pace | None:
    """The seconds of a job's parts: from a measured run if there is one, else by arithmetic.

    Arithmetic adds computing and sending, as if they did not overlap, for the clan and without it alike. A clone
    is taken to reach every other member, and every round. On the line each round is taken to measure its points.

    Args:
        job: what is trained.
        hardware, measured: where seconds are from; neither for none.
        copies: that a rank makes; None if it makes none.
    """
    if measured is not None:
        scale = job.num_samples / job.dp / measured.samples_per_rank

        def measured_s(phase: Phase) -> float:
            if job.points:
                return measured.step_s
            is_competitive = phase.kind is PhaseKind.COMPETITIVE
            return measured.competitive_step_s * phase.batch_factor if is_competitive else measured.step_s

        return Pace(measured.step_s, measured_s, measured.evaluation_s * scale, measured.transfer_s)
    if hardware is None or job.tokens_per_sample is None:
        return None
    flops_s = hardware.compute_flops_s * hardware.compute_share
    host_bytes_s = hardware.host_bytes_s * hardware.link_share
    micro_batch_s = _TRAINING * job.num_parameters * job.micro_batch * job.tokens_per_sample / flops_s

    def computed_s(phase: Phase) -> float:
        sharing = job.in_phase(phase)
        step_s = micro_batch_s * sharing.accumulation + _sending_s(step_traffic(sharing), sharing, hardware)
        return step_s + _average_copy_bytes(job) / host_bytes_s

    eval_tokens = job.num_samples / job.dp * job.tokens_per_sample
    plain = job.without_clan()
    copied = state_bytes(job) * job.guards + _round_copy_bytes(job, copies or Copies())
    return Pace(
        plain_step_s=micro_batch_s * plain.accumulation + _sending_s(step_traffic(plain), plain, hardware),
        step_s=computed_s,
        evaluation_s=_FORWARD * job.num_parameters * eval_tokens / flops_s
        + _sending_s(evaluation_traffic(job, averaged=job.uses_ema), job, hardware),
        transfer_s=_sending_s([*clone_traffic(job), *drift_traffic(job)], job, hardware) + copied / host_bytes_s,
    )


def _average_copy_bytes(job: Job) -> float:
    """Bytes of weights that a step sends to an average in host memory, in the mean."""
    return job.shard * 4 / job.host_average_every if job.uses_ema and job.host_average_every else 0.0


def _round_copy_bytes(job: Job, copies: Copies) -> int:
    """Bytes of a round on the line between device and host, if its arrays lie there.

    Each array and the average go there and back once; the anchor and the average come for each point.
    """
    return 2 * (copies.host_arrays + 1 + job.points) * job.shard * 4 if copies.host_arrays else 0


@dataclass(frozen=True)
class Cost:
    """A whole run.

    Attributes:
        num_steps, num_rounds: of it.
        competitive_steps: in which not all members share gradients.
        undone_steps: whose training is rolled back.
        samples: that the same steps of plain data parallelism would train on.
        unique_samples: that this run trains on and keeps, each counted once.
        trained_samples: whose gradients are computed, one that several members or turns see counted for each of them.
        evaluated_samples: whose losses are computed for the clan itself, counted likewise.
        seconds: by part, ``training``, ``evaluation`` and ``transfer``; None if no pace is known.
        plain_seconds: of the same steps in plain data parallelism.
    """

    num_steps: int
    num_rounds: int
    competitive_steps: int
    undone_steps: int
    samples: int
    unique_samples: int
    trained_samples: int
    evaluated_samples: int
    seconds: dict[str, float] | None
    plain_seconds: float | None

    @property
    def sample_loss_percent(self) -> float:
        """Samples that are not new, of all."""
        return 100.0 * (1.0 - self.unique_samples / self.samples)

    @property
    def work_percent(self) -> float:
        """Extra gradient evaluations, with what evaluations cost, of those of plain data parallelism."""
        share = _FORWARD / _TRAINING
        return 100.0 * ((self.trained_samples + share * self.evaluated_samples) / self.samples - 1.0)

    @property
    def time_percent(self) -> float | None:
        """Extra time for the same number of steps."""
        if self.seconds is None or self.plain_seconds is None:
            return None
        return 100.0 * (sum(self.seconds.values()) / self.plain_seconds - 1.0)

    @property
    def overhead_percent(self) -> float | None:
        """Extra time per unique sample: both losses together."""
        if self.time_percent is None or not self.unique_samples:
            return None
        return 100.0 * ((1.0 + self.time_percent / 100.0) * self.samples / self.unique_samples - 1.0)


def cost_of(job: Job, walk: Walk, pace: Pace | None) -> Cost:
    """Adds up the phases and evaluations of a run.

    Args:
        job: what is trained.
        walk: through the run's rounds.
        pace: seconds of each part, or None.
    """
    phases, num_steps = walk.phases, walk.num_steps
    competitive = [(phase, taken) for phase, taken in phases if phase.kind is PhaseKind.COMPETITIVE]
    num_windows = walk.num_evaluations + sum(job.evaluations(plan) - 1 for plan in walk.ended)
    seconds = None
    if pace is not None:
        seconds = {
            "training": sum(taken * job.turns(phase, taken) * pace.step_s(phase) for phase, taken in phases),
            "evaluation": pace.evaluation_s * num_windows,
            "transfer": pace.transfer_s * walk.num_ended,
        }
    return Cost(
        num_steps=num_steps,
        num_rounds=walk.num_rounds,
        competitive_steps=sum(taken for _, taken in competitive),
        undone_steps=sum(taken for phase, taken in phases if not phase.keeps),
        samples=num_steps * job.clan_batch,
        unique_samples=sum(_unique(phase, taken, job) for phase, taken in phases),
        trained_samples=sum(taken * job.batches(phase, taken) for phase, taken in phases) * job.clan_batch,
        evaluated_samples=num_windows * job.window_samples * job.population_size,
        seconds=seconds,
        plain_seconds=None if pace is None else pace.plain_step_s * num_steps,
    )


def _unique(phase: Phase, taken: int, job: Job) -> int:
    """Samples of a phase whose training is kept: those of the members that share gradients, as others see the same."""
    return taken * job.in_phase(phase).clan_batch if phase.keeps else 0


def _sending_s(collectives: Iterable[Collective], job: Job, hardware: Hardware) -> float:
    everyone = range(job.world_size)
    ranks = {"member": everyone[: job.dp], "clan": everyone, "replica_group": everyone[:: job.dp]}
    return sum(c.wire_bytes(job) / hardware.bytes_s(ranks[c.scope]) for c in collectives)
