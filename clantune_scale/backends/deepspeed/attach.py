"""``deepspeed.initialize``, with a clan attached if the config asks for one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.pipe.dualpipev import DualPipeVModule
from torch.utils.data import Dataset
from typing_extensions import Unpack

from clantune_scale.backends.deepspeed.engine import DeepSpeedBackend, suppress_start_up_noise
from clantune_scale.backends.deepspeed.pipeline import PipelineBackend
from clantune_scale.backends.deepspeed.place import degrees_of, mpu_refusals, unmarked_shards
from clantune_scale.backends.torch.loop_clan import LoopClan
from clantune_scale.config.batch import split_batch
from clantune_scale.config.deepspeed_file import extract, load_ds_config
from clantune_scale.config.deepspeed_limits import EngineFacts, refusals, zero_stage
from clantune_scale.config.deepspeed_values import block_of, steps_of
from clantune_scale.config.schema import ClanConfig
from clantune_scale.data.sampler import ClanDataLoader, is_map_style, require_samples
from clantune_scale.distributed import world
from clantune_scale.distributed.one_world import one_world
from clantune_scale.distributed.topology import Topology
from clantune_scale.errors import ClanError, ConfigError, TopologyError
from clantune_scale.runtime.arguments import ClanArguments, shares
from clantune_scale.runtime.attach import attach_to, require_examples
from clantune_scale.runtime.clan import Clan

# Held from the start: `clantune_scale.run` puts this module's function in the place of DeepSpeed's.
_initialize_engine = deepspeed.initialize


@shares(ClanArguments)
def initialize(
    args: Any = None,
    model: Any = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    config: Any = None,
    mesh_param: Any = None,
    config_params: Any = None,
    *,
    eval_data: Dataset[Any] | None = None,
    num_workers: int = 0,
    **arguments: Unpack[ClanArguments],
) -> tuple[Any, Any, Any, Any]:
    """Takes what ``deepspeed.initialize`` takes and returns the same four things.

    The engine is DeepSpeed's own. With a ``"clantune"`` block in its config, ``engine.clan`` is the clan that
    is attached to it; without one, or with ``"enabled": false``, this is ``deepspeed.initialize``.

    A ``PipelineModule`` and an ``mpu`` are built over the member's ranks: call :func:`clantune_scale.join` with the
    same config first. The returned loader then feeds ``engine.train_batch()``.

    Args:
        args, model, optimizer, model_parameters, training_data, lr_scheduler, distributed_port, mpu,
            dist_init_required, collate_fn, config, mesh_param, config_params: as DeepSpeed documents them.
        eval_data: map-style dataset on which selection compares members. Keep a test split apart from it. A batch
            reaches the engine by keyword if it is a mapping, by position if it is a tuple or list, else as it is.
        num_workers: worker processes of the loader that is made from ``training_data``.
        {arguments}

    Returns:
        engine, optimizer, training data loader (one that follows the clan's phases), scheduler.

    Raises:
        ConfigError: if the block or the batch cannot be used, or there is nothing to evaluate on.
        TopologyError: if the launcher's ranks do not form the clan.
    """
    passed = {
        "args": args,
        "model": model,
        "optimizer": optimizer,
        "model_parameters": model_parameters,
        "lr_scheduler": lr_scheduler,
        "distributed_port": distributed_port,
        "mpu": mpu,
        "dist_init_required": dist_init_required,
        "collate_fn": collate_fn,
        "mesh_param": mesh_param,
    }
    ds_config, block = extract(load_ds_config(_given_config(args, config, config_params)))
    if block is None or not block.enabled:
        passed["args"] = _without_config(args)
        return _initialize_engine(**passed, training_data=training_data, config=ds_config)
    return _initialize_clan(passed, ds_config, block, training_data, eval_data, num_workers, arguments)


def _given_config(args: Any, config: Any, config_params: Any) -> Any:
    """The config, from the first place of DeepSpeed's three that has one."""
    for given in (config, config_params, getattr(args, "deepspeed_config", None)):
        if given is not None:
            return given
    raise ConfigError("there is no DeepSpeed config. Pass config=..., or --deepspeed_config FILE to the script.")


def _initialize_clan(
    passed: dict[str, Any],
    ds_config: dict[str, Any],
    block: ClanConfig,
    training_data: Dataset[Any] | None,
    eval_data: Dataset[Any] | None,
    num_workers: int,
    arguments: ClanArguments,
) -> tuple[Any, Any, Any, Any]:
    if block.members == "line":
        return _initialize_line(passed, ds_config, block, training_data, eval_data, num_workers, arguments)
    _refuse_before_joining(passed, ds_config)
    examples, num_samples = require_examples(eval_data, "initialize"), _num_samples(training_data)
    joined = world.join(
        block.population_size, timeout_s=block.join.timeout_s, port=block.join.port, faults=block.faults
    )
    degrees = degrees_of(passed["model"], passed["mpu"], ds_config)
    topology = Topology.from_world(
        joined.topology.world_size,
        population_size=joined.topology.population_size,
        pp=degrees.pp,
        tp=degrees.tp,
    )
    member_config, batch = split_batch(
        ds_config, population_size=block.population_size, dp_size=topology.dp, counted=degrees.counted
    )
    block, batch = joined.present(block), joined.present_batch(batch)
    if num_samples is not None:
        require_samples(
            num_samples,
            population_size=batch.population_size,
            dp_size=batch.dp_size,
            micro_batch_size=batch.micro_batch,
        )
    suppress_start_up_noise()
    passed["args"] = _without_config(passed["args"])
    engine, optimizer, _, scheduler = _initialize_engine(**passed, config=member_config)
    backend = PipelineBackend(engine) if degrees.pp > 1 or _is_pipeline(engine.module) else DeepSpeedBackend(engine)
    if degrees.tp > 1 and degrees.counted == 1:
        _refuse_unmarked(backend)
    engine.clan = attach_to(
        backend,
        Clan,
        world=joined,
        block=block,
        eval_data=examples,
        batch=batch,
        evaluate=arguments.get("evaluate"),
        setters=arguments.get("gene_setters"),
        collate_fn=passed["collate_fn"],
        total_steps=_scheduled_steps(ds_config),
        num_samples=num_samples,
    )
    return engine, optimizer, _loader(engine, training_data, passed["collate_fn"], num_workers), scheduler


def _loader(
    engine: Any, training_data: Dataset[Any] | None, collate_fn: Callable[[list[Any]], Any] | None, num_workers: int
) -> ClanDataLoader | None:
    """The clan's loader, put in the place of the one that the engine would read from; None without data."""
    if training_data is None:
        return None
    clan: Clan = engine.clan
    loader = clan.loader(training_data, collate_fn=collate_fn or engine.collate_fn, num_workers=num_workers)
    if isinstance(clan.backend, PipelineBackend):
        clan.backend.feed(loader)
    else:
        engine.training_dataloader = loader
    return loader


def _initialize_line(
    passed: dict[str, Any],
    ds_config: dict[str, Any],
    block: ClanConfig,
    training_data: Dataset[Any] | None,
    eval_data: Dataset[Any] | None,
    num_workers: int,
    arguments: ClanArguments,
) -> tuple[Any, Any, Any, Any]:
    """Members on the line: the engine is what ``deepspeed.initialize`` makes of the same config without a clan."""
    # What is missing is said before the engine is built.
    given: dict[str, Any] = {
        **arguments,
        "eval_data": require_examples(eval_data, "initialize"),
        "collate_fn": passed["collate_fn"],
        "total_steps": _scheduled_steps(ds_config),
        "num_samples": _num_samples(training_data),
    }
    suppress_start_up_noise()
    passed["args"] = _without_config(passed["args"])
    engine, optimizer, _, scheduler = _initialize_engine(**passed, config=ds_config)
    attach_engine(engine, block, given, function="initialize")
    return engine, optimizer, _loader(engine, training_data, passed["collate_fn"], num_workers), scheduler


class EngineClan(LoopClan):
    """A clan on a DeepSpeed engine whose members lie on a line; see :func:`attach_engine`."""

    backend: DeepSpeedBackend  # type: ignore[assignment]  # both are engines, and only clipping differs

    def clip_grad_norm_(self) -> torch.Tensor:
        """Refused: DeepSpeed clips inside ``engine.step()``.

        Raises:
            ClanError: always.
        """
        raise ClanError("DeepSpeed clips inside engine.step(). Set gradient_clipping in its config instead.")


def attach_engine(
    engine: Any,
    block: ClanConfig,
    arguments: Mapping[str, Any],
    *,
    scheduler: Any = None,
    function: str = "attach",
) -> EngineClan:
    """A clan whose members lie on a line, on an engine that exists; ``engine.clan`` is it, too.

    Args:
        engine: what ``deepspeed.initialize`` returned.
        block: the ``clantune`` block.
        arguments: of :func:`clantune_scale.attach`.
        scheduler: that the loop steps after each step of the engine; None if there is none, or it is the engine's.
        function: that the user called, for messages.

    Raises:
        ConfigError: if the block asks for members in groups, or the engine or the genes cannot be used.
    """
    if block.members != "line":
        raise ConfigError(
            f"this engine was built over all {engine.world_size} ranks, and members in groups divide them before it "
            f'is built. Set "members" to "line", or call clantune_scale.initialize() in place of '
            f"deepspeed.initialize()."
        )
    examples = require_examples(arguments.get("eval_data"), function)
    backend = PipelineBackend(engine) if _is_pipeline(engine.module) else DeepSpeedBackend(engine, scheduler)
    if backend.tp_size > 1 and engine.autotp_size() <= 1:
        _refuse_unmarked(backend)
    clan = engine.clan = attach_to(
        backend,
        EngineClan,
        world=one_world(timeout_s=block.join.timeout_s),
        block=block,
        eval_data=examples,
        evaluate=arguments.get("evaluate"),
        setters=arguments.get("gene_setters"),
        collate_fn=arguments.get("collate_fn"),
        total_steps=arguments.get("total_steps"),
        num_samples=arguments.get("num_samples"),
        train_step=arguments.get("train_step"),
        watch=arguments.get("watch"),
    )
    return clan


def _is_pipeline(model: Any) -> bool:
    return isinstance(model, deepspeed.PipelineModule)


def _num_samples(training_data: Dataset[Any] | None) -> int | None:
    """The examples of the training data; None if the user feeds the engine."""
    if training_data is None:
        return None
    if not is_map_style(training_data):
        raise ConfigError(
            f"training_data is a {type(training_data).__name__} without a length or an index, and the clan deals "
            f"its examples out by number. Pass a map-style dataset, or leave training_data out and feed the engine "
            f"yourself."
        )
    return len(training_data)  # type: ignore[arg-type]  # torch's Dataset declares no length


def _refuse_before_joining(passed: Mapping[str, Any], ds_config: Mapping[str, Any]) -> None:
    """What can be seen to be wrong before ranks wait for each other."""
    if world.current() is None and (passed["mpu"] is not None or _is_pipeline(passed["model"])):
        what = "a PipelineModule" if _is_pipeline(passed["model"]) else "an mpu"
        raise TopologyError(
            f"{what} was built before the clan was joined, over the ranks of all members. Call "
            f"clantune_scale.join(config), with the config that initialize() gets, and deepspeed.init_distributed() "
            f"before you build it, or start the script with `deepspeed --module clantune_scale.run`."
        )
    if isinstance(passed["model"], DualPipeVModule):
        raise ConfigError(
            "the model is a DualPipeVModule, whose schedule a clan was not tried with. Build a PipelineModule."
        )
    if _is_pipeline(passed["model"]):
        for refusal in refusals(EngineFacts(has_stages=True, zero_stage=zero_stage(ds_config))):
            raise ConfigError(refusal)
    if passed["mpu"] is not None:
        for refusal in mpu_refusals(passed["mpu"]):
            raise ConfigError(refusal)


def _refuse_unmarked(backend: DeepSpeedBackend) -> None:
    """A shard that does not say what it is a part of would be taken for the whole weight at the run's end."""
    names = unmarked_shards(backend.module, backend.place.tp_group)
    if names:
        raise ConfigError(
            f"parameters {names[:3]} are marked as shards or differ between the tensor ranks of a member, and do not "
            f"say along which dimension they are sharded. Set tensor_model_parallel = True, partition_dim and "
            f"partition_stride on them, as Megatron's layers do."
        )


def _without_config(args: Any) -> Any:
    """DeepSpeed refuses a config file in ``args`` beside ``config=``; it has been read."""
    if getattr(args, "deepspeed_config", None) is None:
        return args
    args = copy.copy(args)
    args.deepspeed_config = None
    return args


def _scheduled_steps(ds_config: Mapping[str, Any]) -> int | None:
    """The run's length, if a DeepSpeed scheduler with an end says it."""
    return steps_of(block_of(block_of(ds_config, "scheduler"), "params"), "total_num_steps")
