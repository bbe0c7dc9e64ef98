"""Seconds and samples of a whole run, round by round as the strategy plans it, against plain data parallelism."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from clantune_scale.core.rounds import Phase, PhaseKind, RoundClock
from clantune_scale.core.strategies import Strategy
from clantune_scale.planning.hardware import Hardware
from clantune_scale.planning.job import Job
from clantune_scale.planning.measured import Measured
from clantune_scale.planning.memory import state_bytes
from clantune_scale.planning.traffic import (
    Collective,
    clone_traffic,
    drift_traffic,
    evaluation_traffic,
    step_traffic,
)

# Operations per weight and token: a forward pass 2, a backward pass 4 (Kaplan et al. 2020).
_FORWARD, _TRAINING = 2, 6


@dataclass(frozen=True)
class Pace:
    """Seconds of each part of a run; None everywhere where neither hardware nor a measured run says them.

    Attributes:
        plain_step_s: a step of plain data parallelism on the same ranks.
        step_s: a cooperative step.
        competitive_step_s: a competitive one.
        evaluation_s: the validation window, once.
        transfer_s: clones, copies and the comparison of members at a round's end.
    """

    plain_step_s: float
    step_s: float
    competitive_step_s: float
    evaluation_s: float
    transfer_s: float


def pace_of(job: Job, hardware: Hardware | None, measured: Measured | None) -> Pace | None:
    """The seconds of a job's parts: from a measured run where there is one, else by arithmetic.

    Arithmetic adds computing and sending, as if they did not overlap, for the clan and without it alike. A clone
    is taken to reach every other member, and every round.
    """
    if measured is not None:
        scale = job.num_samples / job.dp / measured.samples_per_rank
        return Pace(
            measured.step_s,
            measured.step_s,
            measured.competitive_step_s,
            measured.evaluation_s * scale,
            measured.transfer_s,
        )
    if hardware is None or job.tokens_per_sample is None:
        return None
    flops_s = hardware.compute_flops_s * hardware.compute_share
    tokens = job.micro_batch * job.accumulation * job.tokens_per_sample
    compute_s = _TRAINING * job.num_parameters * tokens / flops_s
    eval_tokens = job.num_samples / job.dp * job.tokens_per_sample
    plain = job.without_clan()
    return Pace(
        plain_step_s=compute_s + _sending_s(step_traffic(plain), plain, hardware),
        step_s=compute_s + _sending_s(step_traffic(job), job, hardware),
        competitive_step_s=compute_s + _sending_s(step_traffic(job, cooperates=False), job, hardware),
        evaluation_s=_FORWARD * job.num_parameters * eval_tokens / flops_s
        + _sending_s(evaluation_traffic(job, averaged=job.averages), job, hardware),
        transfer_s=_sending_s([*clone_traffic(job), *drift_traffic(job)], job, hardware)
        + job.guards * state_bytes(job) / (hardware.host_bytes_s * hardware.link_share),
    )


@dataclass(frozen=True)
class Cost:
    """A whole run.

    Attributes:
        num_steps, num_rounds: of it.
        competitive_steps: in which members do not share gradients.
        undone_steps: whose training is rolled back.
        samples: that the same steps of plain data parallelism would train on.
        unique_samples: that this run trains on once each and keeps.
        seconds: by part, ``training``, ``evaluation`` and ``transfer``; None where no pace is known.
        plain_seconds: of the same steps in plain data parallelism.
    """

    num_steps: int
    num_rounds: int
    competitive_steps: int
    undone_steps: int
    samples: int
    unique_samples: int
    seconds: dict[str, float] | None
    plain_seconds: float | None

    @property
    def sample_loss_percent(self) -> float:
        """Samples that are not new, of all."""
        return 100.0 * (1.0 - self.unique_samples / self.samples)

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


def cost_of(job: Job, strategy: Strategy, num_steps: int, pace: Pace | None) -> Cost:
    """Walks through the rounds of a run.

    Args:
        job: what is trained.
        strategy: built for ``num_steps`` in all.
        num_steps: of the run; a last round that would go on beyond them counts up to there.
        pace: seconds of each part, or None.
    """
    clock = RoundClock(strategy.plan)
    phases: list[tuple[Phase, int]] = []
    index = step = evaluations = 0
    while step < num_steps:
        for phase in clock.round(index).phases:
            taken = min(phase.num_steps, num_steps - step)
            phases += [(phase, taken)] if taken else []
            step += taken
        evaluations += clock.round(index).end_step <= num_steps
        index += 1
    competitive = [(phase, taken) for phase, taken in phases if phase.kind is PhaseKind.COMPETITIVE]
    num_competitive = sum(taken for _, taken in competitive)
    seconds = None
    if pace is not None:
        factor_steps = sum(taken * phase.batch_factor for phase, taken in competitive)
        seconds = {
            "training": pace.step_s * (num_steps - num_competitive) + pace.competitive_step_s * factor_steps,
            # Once before the first round, and once or twice for the champion.
            "evaluation": pace.evaluation_s * (evaluations + 2),
            "transfer": pace.transfer_s * evaluations,
        }
    return Cost(
        num_steps=num_steps,
        num_rounds=index,
        competitive_steps=num_competitive,
        undone_steps=sum(taken for phase, taken in phases if not phase.keeps),
        samples=num_steps * job.clan_batch,
        unique_samples=round(sum(_unique(phase, taken, job) for phase, taken in phases)),
        seconds=seconds,
        plain_seconds=None if pace is None else pace.plain_step_s * num_steps,
    )


def _unique(phase: Phase, taken: int, job: Job) -> float:
    """Samples of a phase that no other member sees and that are kept."""
    if not phase.keeps:
        return 0.0
    if phase.kind is PhaseKind.COOPERATIVE:
        return float(taken * job.clan_batch)
    team = phase.teams.count(phase.teams[0]) if phase.teams else 1
    return taken * job.clan_batch / job.population_size * team * phase.batch_factor


def _sending_s(collectives: Iterable[Collective], job: Job, hardware: Hardware) -> float:
    everyone = range(job.world_size)
    ranks = {"member": everyone[: job.dp], "clan": everyone, "column": everyone[:: job.dp]}
    return sum(c.wire_bytes(job) / hardware.bytes_s(ranks[c.scope]) for c in collectives)
