"""Which population sizes and duty cycles fit a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from clantune_scale.config.batch import TRAIN, BatchPlan, split_batch
from clantune_scale.config.schema import ClanConfig
from clantune_scale.core.genome import Gene
from clantune_scale.core.strategies import build
from clantune_scale.errors import ConfigError
from clantune_scale.planning.cost import Cost, cost_of, pace_of
from clantune_scale.planning.hardware import Hardware
from clantune_scale.planning.job import Job, describe_job
from clantune_scale.planning.measured import Measured
from clantune_scale.planning.memory import RankMemory, copies_of, rank_memory
from clantune_scale.planning.preflight import run_facts
from clantune_scale.planning.walk import Walk, walk_through

_DUTIES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)


@dataclass(frozen=True)
class Size:
    """What is trained, apart from how the clan is set: the model, and what nobody can read off a config."""

    parameters: tuple[int, ...]
    groups: tuple[int, ...] | None = None
    other_bytes: int = 0
    tokens_per_sample: int | None = None

    def part(self, num_parts: int) -> Size:
        """One of equal tensor and pipeline parts, rounded up."""
        parameters = tuple(-(-count // num_parts) for count in self.parameters)
        groups = None if self.groups is None else tuple(-(-count // num_parts) for count in self.groups)
        return Size(parameters, groups, -(-self.other_bytes // num_parts), self.tokens_per_sample)


def data_parallel_part(ds_config: Mapping[str, Any], batch: BatchPlan | None) -> dict[str, Any]:
    """The config of one tensor and pipeline part of every member: data parallelism over its ranks, nothing else.

    Args:
        ds_config: of whole members.
        batch: that it divides among them; None if it has errors.
    """
    part = {key: value for key, value in ds_config.items() if key not in ("pipeline", "tensor_parallel")}
    if batch is not None and TRAIN in part:
        part[TRAIN] = batch.clan_batch
    return part


@dataclass(frozen=True)
class Forecast:
    """One way to set a clan, and what it costs.

    Attributes:
        population_size, duty_cycle: the setting.
        job: what follows from it.
        memory: of a rank.
        walk: through the run's phases.
        cost: of the run.
    """

    population_size: int
    duty_cycle: float
    job: Job
    memory: RankMemory
    walk: Walk
    cost: Cost


def forecast(
    ds_config: Mapping[str, Any],
    block: ClanConfig,
    genes: tuple[Gene, ...],
    size: Size,
    *,
    world_size: int,
    num_steps: int,
    hardware: Hardware | None,
    measured: Measured | None,
) -> Forecast:
    """What a block costs on so many ranks.

    Args:
        ds_config: the DeepSpeed config, without the block.
        block: the ``clantune`` block.
        genes: that the block's were resolved to.
        size: of the model.
        world_size: ranks that the launcher starts.
        num_steps: optimizer steps of the run, in place of the config's own count, if it has one.
        hardware, measured: where seconds are from; neither for none.

    Raises:
        ConfigError: if ranks or batch do not divide.
    """
    batch = divided(ds_config, 1 if block.members == "line" else block.population_size, world_size)
    facts = run_facts(block, genes, ds_config)
    if facts.total_steps is not None:
        # Without total_steps in the config the strategy has no learning-rate trial and no freeze.
        facts = replace(facts, total_steps=num_steps)
    strategy = build(block.strategy.name, facts, block.strategy.options)
    job = describe_job(
        ds_config,
        block,
        batch,
        strategy,
        parameters=size.parameters,
        groups=size.groups,
        other_bytes=size.other_bytes,
        tokens_per_sample=size.tokens_per_sample,
    )
    walk = walk_through(strategy, num_steps)
    copies = copies_of(job, walk, genes, block.line)
    cost = cost_of(job, walk, pace_of(job, hardware, measured, copies))
    return Forecast(block.population_size, block.duty_cycle, job, rank_memory(job, copies), walk, cost)


def divided(ds_config: Mapping[str, Any], num_models: int, world_size: int) -> BatchPlan:
    """The batch of so many models that are trained at once on the ranks.

    Raises:
        ConfigError: if ranks or batch do not divide.
    """
    dp, rest = divmod(world_size, num_models)
    if rest or not dp:
        raise ConfigError(f"{world_size} ranks do not divide among {num_models} replicas. Change one.")
    return split_batch(ds_config, population_size=num_models, dp_size=dp)[1]


def fitting(
    ds_config: Mapping[str, Any],
    block: ClanConfig,
    genes: tuple[Gene, ...],
    size: Size,
    *,
    budget_percent: float,
    **how: Any,
) -> list[Forecast]:
    """Every population size and duty cycle whose overhead is within the budget and whose state fits the devices.

    Args:
        ds_config, block, genes, size: as for :func:`forecast`; the block's own two values are replaced.
        budget_percent: largest overhead per unique sample.
        **how: the rest of :func:`forecast`'s arguments.

    Returns:
        Largest populations first, and of one size the largest duty cycle first.
    """
    has_specialized = any(gene.kind == "specialized" for gene in genes)
    duties = _DUTIES if has_specialized else (block.duty_cycle,)
    found = []
    # Groups divide the ranks; the line takes any number of members.
    most = how["world_size"] if block.members == "groups" else max(how["world_size"], block.population_size)
    for population_size in range(2, most + 1):
        for duty in duties:
            changed = block.model_copy(update={"population_size": population_size, "duty_cycle": duty})
            try:
                one = forecast(ds_config, changed, genes, size, **how)
            except ConfigError:
                continue  # this many members cannot share these ranks or this batch
            if _fits(one, budget_percent, how["hardware"]):
                found.append(one)
    return sorted(found, key=lambda one: (-one.population_size, -one.duty_cycle))


def _fits(one: Forecast, budget_percent: float, hardware: Hardware | None) -> bool:
    overhead = one.cost.overhead_percent
    is_small = hardware is None or one.memory.peak <= hardware.memory_bytes
    return overhead is not None and overhead <= budget_percent and is_small
