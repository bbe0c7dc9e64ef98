"""A clan on a model and an optimizer of Megatron-core's, in a training loop of the user's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import Dataset

from clantune_scale import world
from clantune_scale.backends.megatron.engine import MegatronBackend
from clantune_scale.backends.megatron.rules import only_chunk
from clantune_scale.batch import split_batch
from clantune_scale.clan import Clan
from clantune_scale.ds_config import extract, load_ds_config
from clantune_scale.errors import ConfigError, TopologyError
from clantune_scale.evaluation import Evaluate, ValidationWindow
from clantune_scale.expression import Setter


def attach_megatron(
    model: Any,
    optimizer: Any,
    scheduler: Any = None,
    *,
    config: str | os.PathLike[str] | Mapping[str, Any],
    forward_step: Callable[..., Any],
    seq_length: int,
    eval_data: Dataset,
    evaluate: Evaluate | None = None,
    gene_setters: Mapping[str, Setter] | None = None,
    collate_fn: Callable[[list], Any] | None = None,
) -> Clan | None:
    """Attaches a clan to a Megatron-core model; the training loop stays Megatron's.

    Call ``clantune_scale.join(config)`` before the process group exists, and build everything in the world that is
    left: the member's. Then read from ``clan.loader(dataset)`` and give the schedule
    ``num_microbatches=clan.backend.accumulation`` (Megatron's calculator follows, where it is used).

    Args:
        model: Megatron's ``DistributedDataParallel``, or a list of one.
        optimizer: from ``get_megatron_optimizer``.
        scheduler: Megatron's ``OptimizerParamScheduler``, or None.
        config: a mapping or a JSON file with the batch (``train_batch_size`` of the whole clan,
            ``train_micro_batch_size_per_gpu``, ``gradient_accumulation_steps``; two say the third) and the
            ``clantune`` block.
        forward_step: the ``(data_iterator, model) -> (output, loss_func)`` that training gives to the schedule.
        seq_length: tokens of a sequence.
        eval_data: map-style dataset on which selection compares members; ``forward_step`` gets its batches too.
        evaluate: ``(model, batch) -> loss`` in place of ``forward_step``, run on all stages at once; what the last
            pipeline stage returns counts.
        gene_setters: by target name, a function that puts a gene's value into effect.
        collate_fn: joins samples of ``eval_data`` to a batch; torch's default where None.

    Returns:
        The clan; None where the config has no ``clantune`` block or one with ``"enabled": false``.

    Raises:
        ConfigError: if the config, the model or the optimizer cannot be used.
        TopologyError: if the clan was not joined, or the ranks do not form it.
    """
    rest, block = extract(load_ds_config(config))
    if block is None or not block.enabled:
        return None
    joined = world.current()
    if joined is None:
        raise TopologyError(
            "the clan was not joined, and the model was built over the ranks of all members. Call "
            "clantune_scale.join(config) before torch.distributed.init_process_group()."
        )
    if joined.topology.population_size != block.population_size:
        raise TopologyError(
            f"this process has joined a clan of {joined.topology.population_size} members, and the config says "
            f"{block.population_size}. Give join() and attach_megatron() the same config."
        )
    if not hasattr(eval_data, "__getitem__"):
        raise ConfigError(
            f"eval_data is a {type(eval_data).__name__} without __getitem__, and every member must see the same "
            f"examples of it. Pass a map-style dataset."
        )
    dp_group = only_chunk(model).dp_group
    _, batch = split_batch(rest, population_size=block.population_size, dp_size=dp_group.size())
    backend = MegatronBackend(
        model,
        optimizer,
        scheduler,
        forward_step=forward_step,
        seq_length=seq_length,
        micro_batch_size=batch.micro_batch,
        accumulation=batch.accumulation,
    )
    window = ValidationWindow(
        eval_data,
        num_samples=block.fitness.num_samples,
        batch_size=block.fitness.batch_size or batch.micro_batch,
        dp_rank=backend.dp_rank,
        dp_size=backend.dp_size,
        collate_fn=collate_fn,
    )
    return Clan(
        world=joined,
        backend=backend,
        config=block,
        batch=batch,
        window=window,
        evaluate=evaluate,
        setters=gene_setters,
        total_steps=block.total_steps,
    )
