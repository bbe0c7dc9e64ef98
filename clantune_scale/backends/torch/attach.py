"""``clantune_scale.attach``: a clan in a plain PyTorch loop, with FSDP2 or DDP."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Unpack

from clantune_scale.backends.join import join
from clantune_scale.backends.torch.ddp import DDPBackend
from clantune_scale.backends.torch.engine import LoopBackend
from clantune_scale.backends.torch.fsdp import FSDPBackend, data_parallel_size
from clantune_scale.backends.torch.loop_clan import LoopClan
from clantune_scale.backends.torch.plain import PlainBackend
from clantune_scale.config.batch import ACCUMULATION, CLIPPING, MICRO, clipping_of, split_batch, with_arguments
from clantune_scale.config.deepspeed_file import load_config, require_block
from clantune_scale.config.schema import ClanConfig
from clantune_scale.distributed.one_world import one_world
from clantune_scale.distributed.world import ClanWorld
from clantune_scale.errors import ConfigError
from clantune_scale.runtime.arguments import LoopArguments, shares
from clantune_scale.runtime.attach import attach_to, require_examples


@shares(LoopArguments)
def attach(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    scheduler: Any = None,
    *,
    accumulation: int | None = None,
    gradient_clipping: float | None = None,
    scaler: torch.amp.GradScaler | None = None,
    **arguments: Unpack[LoopArguments],
) -> LoopClan:
    """Attaches a clan to a model in a loop of your own.

    With ``"members": "line"`` call it once model and optimizer exist: the model may be plain, under
    ``DistributedDataParallel`` or ``fully_shard``, or a DeepSpeed engine (then without ``optimizer``). With
    ``"members": "groups"`` call ``clantune_scale.join(config)`` before ``init_process_group``: from there on the world,
    and every mesh and group, is the member's, and the model is under ``fully_shard`` or ``DistributedDataParallel``.
    The loop is then::

        clan = clantune_scale.attach(model, optimizer, scheduler, config=config, eval_data=validation)
        for step in clan.steps(clan.loader(dataset), until=num_steps):
            for batch in step:
                (model(*batch) / len(step)).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        clan.finish()

    A loop of another form works too. It calls ``optimizer.step()`` after ``clan.backend.accumulation`` micro-batches,
    and ``scheduler.step()`` once after each if there is a scheduler. A round's end (evaluation, cloning) happens inside
    the call that ends the step.

    A validation batch reaches the model as ``model(**batch)`` if it is a mapping, as ``model(*batch)`` if it is a tuple
    or list, and else as ``model(batch)``, on the device of the parameters. The clan reads the loss that the model
    returns, or that a returned mapping or object has as ``loss``. A model that returns logits trains too; give
    ``evaluate`` then.

    Args:
        model: what the loop calls; ``torch.compile`` may be around it or in it.
        optimizer: made from the model's parameters after they were sharded; None for a DeepSpeed engine's own.
        scheduler: goes with a clone, and ends each step; None if there is none, it moves otherwise, or a DeepSpeed
            engine steps it.
        accumulation: micro-batches per optimizer step; None takes the config's, else 1. A gene may change it.
        gradient_clipping: gradient-norm threshold, 0 for none; None takes the config's, else 0. A gene may change it.
        scaler: torch's ``GradScaler``, if the loop steps by one. Steps that it skips are not counted.
        {arguments}

    Returns:
        The clan, hooked onto model and optimizer.

    Raises:
        ConfigError: if the block, the model's parallelism or the optimizer cannot be used, a keyword contradicts the
            config, or there is nothing to evaluate on.
        TopologyError: if a process group existed before a clan of groups was joined, or ranks do not form the clan.
    """
    settings, found = load_config(arguments["config"])
    block = require_block(found)
    require_examples(arguments["eval_data"], "attach")
    if _is_deepspeed_engine(model):
        from clantune_scale.backends.deepspeed.attach import attach_engine

        return attach_engine(model, block, arguments, scheduler=scheduler)
    if optimizer is None:
        raise ConfigError("attach() needs the optimizer that updates the model. Pass it after the model.")
    joined = _world(block)
    settings = with_arguments(
        settings,
        function="attach",
        given={
            MICRO: ("micro_batch_size", arguments.get("micro_batch_size")),
            ACCUMULATION: ("accumulation", accumulation),
            CLIPPING: ("gradient_clipping", gradient_clipping),
        },
    )
    backend = _backend(model, optimizer, scheduler, settings, block, scaler)
    return attach_to(
        backend,
        LoopClan,
        world=joined,
        block=joined.present(block),
        eval_data=arguments["eval_data"],
        evaluate=arguments.get("evaluate"),
        setters=arguments.get("gene_setters"),
        collate_fn=arguments.get("collate_fn"),
        total_steps=arguments.get("total_steps"),
        num_samples=arguments.get("num_samples"),
        train_step=arguments.get("train_step"),
        watch=arguments.get("watch"),
    )


def _is_deepspeed_engine(model: Any) -> bool:
    deepspeed = sys.modules.get("deepspeed")
    return deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine)


def _world(block: ClanConfig) -> ClanWorld:
    if block.members == "line":
        return one_world(timeout_s=block.join.timeout_s)
    if not dist.is_initialized():
        raise ConfigError(
            "there is no process group yet, so the model is not parallel. Call init_process_group() after "
            "clantune_scale.join(), apply fully_shard() or DDP, then attach()."
        )
    return join(block)


def _backend(
    model: torch.nn.Module,
    optimizer: Any,
    scheduler: Any,
    settings: Mapping[str, Any],
    block: ClanConfig,
    scaler: torch.amp.GradScaler | None,
) -> LoopBackend:
    """The backend for what the model is, its batch a share of the clan's (on the line, the whole of it).

    Raises:
        ConfigError: if the model is neither sharded by FSDP2 nor wrapped by DDP, or the batch does not divide.
    """
    # torch.compile's module around a model is not an instance of what it compiles.
    module = getattr(model, "_orig_mod", model)
    is_line = block.members == "line"
    population_size = 1 if is_line else block.population_size
    if isinstance(module, DistributedDataParallel):
        options = _batch_and_clip(settings, population_size, dp_size=dist.get_world_size())
        return DDPBackend(model, module, optimizer, scheduler, is_line=is_line, scaler=scaler, **options)
    if any(isinstance(part, FSDPModule) for part in module.modules()):
        options = _batch_and_clip(settings, population_size, dp_size=data_parallel_size(module, is_line=is_line))
        return FSDPBackend(model, module, optimizer, scheduler, is_line=is_line, scaler=scaler, **options)
    if is_line:
        dp_size = dist.get_world_size() if dist.is_initialized() else 1
        options = _batch_and_clip(settings, population_size, dp_size=dp_size)
        return PlainBackend(model, module, optimizer, scheduler, scaler=scaler, **options)
    raise ConfigError(
        f"the model is a plain {type(module).__name__}, whose gradients nothing averages. Apply fully_shard() to it or "
        f"wrap it in DistributedDataParallel, also if a member has one rank."
    )


def _batch_and_clip(settings: Mapping[str, Any], population_size: int, *, dp_size: int) -> dict[str, Any]:
    # Members that died since the start do not change the share of those that are left.
    _, batch = split_batch(settings, population_size=population_size, dp_size=dp_size)
    return {
        "micro_batch_size": batch.micro_batch,
        "accumulation": batch.accumulation,
        "gradient_clipping": clipping_of(settings) or 0.0,
    }
