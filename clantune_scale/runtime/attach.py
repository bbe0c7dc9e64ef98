"""What every way of attaching a clan to an engine ends with, and asks for first: examples that members are compared on.

Each way (``initialize``, ``attach``, ``attach_megatron``) joins the clan and builds the member's engine by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from clantune_scale.config.batch import BatchPlan
from clantune_scale.config.default_genes import ADAMW, genes_of
from clantune_scale.config.schema import ClanConfig
from clantune_scale.core.genome import Gene
from clantune_scale.core.rounds import expected_steps, sees_samples_once
from clantune_scale.core.strategies import Strategy, build
from clantune_scale.distributed.self_check import check_parameters, check_world
from clantune_scale.distributed.world import ClanWorld
from clantune_scale.errors import ConfigError
from clantune_scale.results.champion_formats import check_forms
from clantune_scale.runtime.clan import Clan
from clantune_scale.runtime.engine_protocol import Backend, TunedEngine
from clantune_scale.runtime.genome_application import Setter, bind_genes
from clantune_scale.runtime.line.members import TrainStep
from clantune_scale.runtime.line.refusals import require_line, require_no_slopes
from clantune_scale.runtime.loaders import make_window
from clantune_scale.runtime.steps import Watch
from clantune_scale.runtime.validation_window import Evaluate

AnyClan = TypeVar("AnyClan", bound=Clan)


def require_examples(eval_data: Dataset[Any] | None, function: str) -> Dataset[Any]:
    """Refuses a clan that has nothing to compare its members on, before ranks wait for each other.

    Args:
        eval_data: what the user gave.
        function: to which, for the message.

    Returns:
        The same.

    Raises:
        ConfigError: if it is None.
    """
    if eval_data is None:
        raise ConfigError(
            f"a clan compares its members on common examples and there are none. Pass eval_data=... to {function}(), "
            f"a map-style dataset apart from the training and test data."
        )
    return eval_data


def attach_to(
    backend: Backend,
    kind: type[AnyClan],
    *,
    world: ClanWorld,
    block: ClanConfig,
    eval_data: Dataset,
    batch: BatchPlan | None = None,
    evaluate: Evaluate | None = None,
    setters: Mapping[str, Setter] | None = None,
    collate_fn: Callable[[list], Any] | None = None,
    total_steps: int | None = None,
    num_samples: int | None = None,
    train_step: TrainStep | None = None,
    watch: Watch | None = None,
) -> AnyClan:
    """Hooks a clan onto a member's engine, with a window on ``eval_data`` as the block's ``fitness`` says.

    Args:
        backend: the member's engine.
        kind: of clan.
        world: from joining.
        block: for the members that are present.
        eval_data: map-style dataset on which selection compares members.
        batch: how the clan's batch is divided; the engine's own on every member if None.
        evaluate: ``(engine, batch) -> loss`` in place of the model's own loss, or None.
        setters: by target, for genes that the user registers.
        collate_fn: joins validation samples to a batch; torch's default if None.
        total_steps: optimizer steps of the whole run, if the block does not say.
        num_samples: of the training data, for the default genes; None if it is not known.
        train_step: does one optimizer step, for members on the line; None if the loop takes its steps from the clan.
        watch: shows the clan micro-batches and losses; None watches the model's forward pass.

    Raises:
        ConfigError: if the genes, the data or the engine cannot be used.
        TopologyError: if ranks do not form the clan.
    """
    batch = batch or _own_batch(backend, block)
    total_steps = block.total_steps or total_steps
    _check_engine(world, backend, block)
    is_once = sees_samples_once(
        num_samples,
        # The number of members that were launched: genes must not change when members are lost.
        batch_size=batch.member_batch * world.launched,
        num_steps=expected_steps(total_steps, block.round_length),
    )
    genes, strategy = _rules(block, backend, setters or {}, total_steps=total_steps, is_once=is_once)
    clan = kind(
        world=world,
        backend=backend,
        config=block,
        batch=batch,
        genes=genes,
        strategy=strategy,
        window=make_window(backend, block.fitness, eval_data, collate_fn=collate_fn),
        evaluate=evaluate,
        setters=setters,
        train_step=train_step,
        watch=watch,
    )
    clan.start()
    return clan


def _own_batch(backend: Backend, block: ClanConfig) -> BatchPlan:
    """The clan's batch if every engine trains on the batch that it was made with; members on the line share one."""
    return BatchPlan.of_members(
        1 if block.members == "line" else block.population_size,
        micro_batch=backend.micro_batch_size,
        accumulation=backend.accumulation,
        dp_size=backend.dp_size,
    )


def _check_engine(world: ClanWorld, backend: Backend, block: ClanConfig) -> None:
    """Refuses, on all ranks, an engine that does not fit the clan or its config."""
    world.arrange(pp=backend.pp_size, tp=backend.tp_size, stands=(backend.pp_rank, backend.dp_rank, backend.tp_rank))
    if block.members == "groups":
        check_world(world, backend.device)
        check_parameters(world, backend.module)
    check_forms(block.checkpoint.champion, backend.engine, backend)
    _require_rates(backend)


def _require_rates(backend: Backend) -> None:
    """Refuses an optimizer that has no learning rate to scale: the final decay scales every group's."""
    for index, group in enumerate(backend.param_groups()):
        if group.get("lr") is None:
            raise ConfigError(
                f"parameter group {index} of {backend.optimizer_name()} has the learning rate {group.get('lr')}, so "
                f"there is nothing for a clan to scale. Give the optimizer a learning rate (lr=...) in place of one "
                f"that it finds itself."
            )


def _rules(
    block: ClanConfig,
    backend: Backend,
    setters: Mapping[str, Setter],
    *,
    total_steps: int | None,
    is_once: bool,
) -> tuple[tuple[Gene, ...], Strategy]:
    """The genes that this engine has, the same on all ranks of a member, and the strategy that changes them.

    Args:
        block: names the genes, or leaves them to the defaults.
        backend: the member's engine.
        setters: by target, for genes that the user registers.
        total_steps: optimizer steps of the whole run, or None.
        is_once: whether no sample is seen twice, which default genes depend on.
    """
    rule, decays = optimizer_facts(backend)
    configs = genes_of(block, sees_samples_once=is_once, optimizer=rule, weight_decays=decays)
    genes = bind_genes(configs, backend, setters, quiet=configs.keys() - block.genes.keys())
    facts = block.facts(genes, total_steps=total_steps, sees_samples_once=is_once)
    strategy = build(block.strategy.name, facts, block.strategy.options)
    if block.members == "line":
        require_line(block, strategy, genes, backend, setters=setters)
    else:
        require_no_slopes(strategy)
    return genes, strategy


def optimizer_facts(backend: TunedEngine) -> tuple[str, list[float]]:
    """(update rule, weight decays) of a member's optimizer, the same on all its ranks (a member collective).

    Each pipeline stage has parameter groups of its own, and a stage may have none with a decay. All ranks of a member
    must bind the same genes. So they agree on the largest decay, and on AdamW if no stage has another rule.
    """
    rule = backend.update_rule()
    decays = [float(group.get("weight_decay", 0.0)) for group in backend.param_groups()]
    if backend.pp_size == 1:
        return rule, decays
    everyone = torch.tensor(
        [max(decays, default=0.0), float(rule not in (ADAMW, ""))], dtype=torch.float64, device=backend.device
    )
    dist.all_reduce(everyone, op=dist.ReduceOp.MAX)
    largest, is_other = everyone.tolist()
    return "mixed" if is_other else ADAMW, [largest]
