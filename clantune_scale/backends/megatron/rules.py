"""Settings that a clan of Megatron-core members cannot run with, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron.core import num_microbatches_calculator
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

from clantune_scale.errors import ConfigError

_OPTIMIZERS = (FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer)


def only_chunk(model: Any) -> Any:
    """The one model chunk of this rank.

    Args:
        model: Megatron's ``DistributedDataParallel``, or a list of one, as Megatron's trainers hold it.

    Raises:
        ConfigError: if there are several, or the wrapper is another one.
    """
    chunks = list(model) if isinstance(model, list | tuple) else [model]
    if len(chunks) != 1:
        raise ConfigError(
            f"this rank holds {len(chunks)} model chunks, and a clan cannot evaluate virtual pipeline stages. "
            f"Leave virtual_pipeline_model_parallel_size unset."
        )
    if not isinstance(chunks[0], DistributedDataParallel):
        raise ConfigError(
            f"the model is a {type(chunks[0]).__name__}, and the clan hooks the gradient reduction of Megatron-core's "
            f"DistributedDataParallel. Wrap the model in it. For FSDP2 use clantune_scale.attach()."
        )
    return chunks[0]


def refuse_unsupported(model: Any, config: Any, optimizer: Any) -> None:
    """Refuses settings whose state or gradients this backend does not find.

    Args:
        model: Megatron's ``DistributedDataParallel``.
        config: its ``TransformerConfig``.
        optimizer: Megatron's.

    Raises:
        ConfigError: for the first of them.
    """
    for text in _refusals(model, config, optimizer):
        raise ConfigError(text)


def _refusals(model: Any, config: Any, optimizer: Any) -> Iterator[str]:
    for degree in ("context_parallel_size", "expert_model_parallel_size"):
        if getattr(config, degree) > 1:
            yield f"{degree} is {getattr(config, degree)}, which a clan does not support in this version. Set it to 1."
    if model.ddp_config.num_distributed_optimizer_instances > 1:
        yield (
            f"num_distributed_optimizer_instances is {model.ddp_config.num_distributed_optimizer_instances}, and each "
            f"member of a clan is an instance already. Set it to 1."
        )
    if config.finalize_model_grads_func is None:
        yield (
            "config.finalize_model_grads_func is None, so Megatron's schedules would not reduce gradients. "
            "Set it to megatron.core.distributed.finalize_model_grads."
        )
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not isinstance(part, _OPTIMIZERS):
            names = ", ".join(kind.__name__ for kind in _OPTIMIZERS)
            yield f"the optimizer is a {type(part).__name__}, and the clan cannot move its state. Use one of {names}."
    for setting in ("optimizer_cpu_offload", "use_precision_aware_optimizer"):
        if getattr(optimizer.config, setting):
            yield f"{setting} is on, and the clan cannot find the fp32 weights with it. Set it to False."
    calculator = num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR
    if isinstance(calculator, num_microbatches_calculator.RampupBatchsizeNumMicroBatchesCalculator):
        yield "the batch size ramps up, so members would compare different batches. Leave rampup_batch_size unset."
