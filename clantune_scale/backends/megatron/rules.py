"""What a clan of Megatron-core members cannot run under, with what to change."""

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
        ConfigError: if there are several, or it is another wrapper.
    """
    chunks = list(model) if isinstance(model, list | tuple) else [model]
    if len(chunks) != 1:
        raise ConfigError(
            f"this rank holds {len(chunks)} model chunks, and virtual pipeline stages are not evaluated by a clan. "
            f"Leave virtual_pipeline_model_parallel_size unset."
        )
    if not isinstance(chunks[0], DistributedDataParallel):
        raise ConfigError(
            f"the model is a {type(chunks[0]).__name__}, and gradients are shared where Megatron-core's "
            f"DistributedDataParallel reduces them. Wrap the model in it; for FSDP2 use clantune_scale.attach()."
        )
    return chunks[0]


def refuse_unsupported(model: Any, config: Any, optimizer: Any) -> None:
    """Settings under which state or gradients lie where this backend does not look.

    Args:
        model: Megatron's ``DistributedDataParallel``.
        config: its ``TransformerConfig``.
        optimizer: Megatron's.

    Raises:
        ConfigError: with the first of them.
    """
    for text in _refusals(model, config, optimizer):
        raise ConfigError(text)


def _refusals(model: Any, config: Any, optimizer: Any) -> Iterator[str]:
    for degree in ("context_parallel_size", "expert_model_parallel_size"):
        if getattr(config, degree) > 1:
            yield f"{degree} is {getattr(config, degree)}, which a clan does not support in this version. Set it to 1."
    if model.ddp_config.num_distributed_optimizer_instances > 1:
        yield (
            f"num_distributed_optimizer_instances is {model.ddp_config.num_distributed_optimizer_instances}, and the "
            f"clan has an instance for each member already. Set it to 1."
        )
    if config.finalize_model_grads_func is None:
        yield (
            "config.finalize_model_grads_func is None, so that Megatron's schedules would not reduce gradients. "
            "Set it to megatron.core.distributed.finalize_model_grads."
        )
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if not isinstance(part, _OPTIMIZERS):
            names = ", ".join(kind.__name__ for kind in _OPTIMIZERS)
            yield f"the optimizer is a {type(part).__name__}, whose state the clan cannot move. Use one of {names}."
    for setting in ("optimizer_cpu_offload", "use_precision_aware_optimizer"):
        if getattr(optimizer.config, setting):
            yield f"{setting} is on, and the clan does not find the fp32 weights there. Set it to False."
    calculator = num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR
    if isinstance(calculator, num_microbatches_calculator.RampupBatchsizeNumMicroBatchesCalculator):
        yield "the batch size ramps up, which moves what members compare. Leave rampup_batch_size unset."
