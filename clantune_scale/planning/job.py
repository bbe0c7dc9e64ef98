"""A run as the planner sees it: how large the model is, how it is sharded, what the strategy keeps.

A rank is the first of its model: the last one's shard may be smaller by the padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from clantune_scale.config.batch import BatchPlan
from clantune_scale.config.deepspeed_limits import dtype_of, zero_stage
from clantune_scale.config.deepspeed_values import block_of, number_of
from clantune_scale.config.schema import ClanConfig
from clantune_scale.core.rounds import Phase, PhaseKind, RoundPlan
from clantune_scale.core.strategies import Strategy

_WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
# Below this many elements ZeRO 3 keeps a parameter whole on every rank (DeepSpeed's default).
_PERSISTENCE = 100_000
# What it keeps gathered until it is used again, at most, and how far ahead it looks (DeepSpeed's defaults for both).
_KEEPS = 1_000_000_000
_MOMENTS = {"adam": 2, "adamw": 2, "sgd": 1, "lion": 1, "adagrad": 1}


@dataclass(frozen=True)
class Job:
    """One rank's share of work and state is computed from this.

    Attributes:
        parameters: elements of each trainable parameter; one number for all if the model is not known.
        groups: elements of each of the optimizer's groups.
        other_bytes: frozen parameters and buffers.
        stage: ZeRO's, 0 to 3.
        width: bytes of a weight that the model computes with, and of a gradient on the wire.
        moments: optimizer states of 4 bytes per weight.
        population_size, dp: models that are trained at once, and data-parallel ranks of one. With members on the line
            it is one model.
        micro_batch, accumulation: as in :class:`BatchPlan`.
        uses_ema: whether the strategy keeps an average of the weights.
        guards: whether the strategy keeps a rollback snapshot.
        num_samples, eval_batch: of the validation window.
        tokens_per_sample: for compute; None if unknown.
        persistence: largest parameter that ZeRO 3 does not partition for computing.
        keeps: elements that ZeRO 3 keeps gathered from the forward to the backward pass.
        points: members on the line of the one model; 0 if members are groups of ranks, or if there is no clan.
        host_average_every: optimizer steps between two updates of an average that lies in host memory; None if it lies
            on the device.
    """

    parameters: tuple[int, ...]
    groups: tuple[int, ...]
    other_bytes: int
    stage: int
    width: int
    moments: int
    population_size: int
    dp: int
    micro_batch: int
    accumulation: int
    uses_ema: bool
    guards: bool
    num_samples: int
    eval_batch: int
    tokens_per_sample: int | None = None
    persistence: int = _PERSISTENCE
    keeps: int = _KEEPS
    points: int = 0
    host_average_every: int | None = None

    @property
    def num_parameters(self) -> int:
        """Trainable elements."""
        return sum(self.parameters)

    @property
    def world_size(self) -> int:
        """Ranks of all models."""
        return self.population_size * self.dp

    @property
    def clan_batch(self) -> int:
        """Samples of a cooperative step."""
        return self.world_size * self.micro_batch * self.accumulation

    @property
    def padded(self) -> int:
        """Elements of the flat buffers that a model's ranks shard, padding included."""
        if self.stage == 3:
            return sum(_up(size, self.dp) for size in self.parameters)
        # ZeRO 1 and 2 align each group's buffer to twice the degree (nccl_start_alignment_factor).
        return sum(_up(size, 2 * self.dp) for size in self.groups) if self.stage else self.num_parameters

    @property
    def shard(self) -> int:
        """Elements of fp32 weights that one rank updates."""
        return self.padded // self.dp if self.stage else self.num_parameters

    @property
    def persistent(self) -> int:
        """ZeRO 3: padded elements of parameters that stay whole on every rank."""
        return sum(_up(size, self.dp) for size in self.parameters if size <= self.persistence)

    @property
    def num_eval_batches(self) -> int:
        """Batches of the validation window, over all ranks of a model."""
        return self.num_samples // (self._eval_size * self.dp) * self.dp

    @property
    def window_samples(self) -> int:
        """Samples of the validation window: as many as share out evenly, of a dataset that has enough."""
        return self.num_eval_batches * self._eval_size

    @property
    def _eval_size(self) -> int:
        """Samples of one of its batches."""
        return max(min(self.eval_batch, self.num_samples // self.dp), 1)

    def in_phase(self, phase: Phase) -> Job:
        """Those who share gradients in a phase, as a clan of their own, with the micro-batches that they take there.

        Teams of one size, as strategies plan them: teams that fitness makes are not known before the run. On the line
        all ranks share gradients in every phase.
        """
        if self.points:
            return self
        mates = phase.teams.count(phase.teams[0]) if phase.teams else 1
        size = self.population_size if phase.kind is PhaseKind.COOPERATIVE else mates
        return replace(self, population_size=size, accumulation=self.accumulation * phase.batch_factor)

    def turns(self, phase: Phase, taken: int | None = None) -> int:
        """How many members train a phase one after the other, each team as one; 1 if no turns are taken.

        Args:
            phase: of the run.
            taken: the run's own steps in it; all of them if None. The other turns follow at the phase's end.
        """
        if not self.points or phase.kind is PhaseKind.COOPERATIVE or taken not in (None, phase.num_steps):
            return 1
        return len(set(phase.teams)) if phase.teams else self.points

    def batches(self, phase: Phase, taken: int | None = None) -> int:
        """How many times the clan's batch a step of a phase trains on, over all ranks and turns."""
        return self.turns(phase, taken) if self.points else phase.batch_factor

    def evaluations(self, plan: RoundPlan) -> int:
        """How often a model goes through the validation window for a round: on the line once for each point or turn."""
        if not self.points:
            return 1
        if plan.phases[-1].kind is PhaseKind.COMPETITIVE:
            return self.turns(plan.phases[-1])
        return self.points if plan.explores else 1

    def without_clan(self) -> Job:
        """Plain data parallelism on the same ranks."""
        return replace(self, population_size=1, dp=self.world_size, uses_ema=False, guards=False, points=0)

    def replicated(self, num_replicas: int, batch: BatchPlan) -> Job:
        """Plain data parallelism of replicas, each of which is sharded over its own ranks (HSDP).

        Args:
            num_replicas: that divide the ranks.
            batch: divided among them.
        """
        return replace(
            self.without_clan(),
            population_size=num_replicas,
            dp=batch.dp_size,
            micro_batch=batch.micro_batch,
            accumulation=batch.accumulation,
        )


def describe_job(
    ds_config: Mapping[str, Any],
    block: ClanConfig,
    batch: BatchPlan,
    strategy: Strategy,
    *,
    parameters: Sequence[int],
    groups: Sequence[int] | None = None,
    other_bytes: int = 0,
    tokens_per_sample: int | None = None,
) -> Job:
    """The job that a checked config asks for.

    Args:
        ds_config: the DeepSpeed config.
        block: its clantune block.
        batch: how the batch is divided among models.
        strategy: built for the run.
        parameters: elements of each trainable parameter.
        groups: elements of each of the optimizer's groups; one group if None.
        other_bytes: frozen parameters and buffers.
        tokens_per_sample: None if it is not known.
    """
    zero, optimizer = (block_of(ds_config, name) for name in ("zero_optimization", "optimizer"))
    is_line = block.members == "line"
    name = str(optimizer.get("type", "adamw")).lower()
    moments = _MOMENTS.get(name, 2)
    if name == "sgd" and not block_of(optimizer, "params").get("momentum"):
        moments = 0
    return Job(
        parameters=tuple(parameters),
        groups=tuple(groups or (sum(parameters),)),
        other_bytes=other_bytes,
        stage=zero_stage(ds_config),
        width=_WIDTH[dtype_of(ds_config)],
        moments=moments,
        population_size=batch.population_size,
        dp=batch.dp_size,
        micro_batch=batch.micro_batch,
        accumulation=batch.accumulation,
        uses_ema=strategy.uses_ema,
        guards=strategy.guards,
        num_samples=block.fitness.num_samples,
        eval_batch=block.fitness.batch_size or batch.micro_batch,
        tokens_per_sample=tokens_per_sample,
        persistence=_of_stage_3(zero, "param_persistence_threshold", _PERSISTENCE),
        keeps=min(_of_stage_3(zero, key, _KEEPS) for key in ("max_live_parameters", "max_reuse_distance")),
        points=block.population_size if is_line else 0,
        host_average_every=block.line.average_every if is_line and block.line.store == "host" else None,
    )


def _of_stage_3(zero: Mapping[str, Any], key: str, default: int) -> int:
    """A number of elements, under either of the two names that DeepSpeed takes."""
    return int(number_of(zero, f"stage3_{key}", number_of(zero, key, default)))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
