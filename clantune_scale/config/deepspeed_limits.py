"""DeepSpeed settings that a clan cannot run under: one list, for the live engine and for a config without one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from clantune_scale.config.deepspeed_optimizers import optimizer_refusals, scheduler_refusals
from clantune_scale.config.deepspeed_schema import REMOVED_ZERO_KEYS, schema_refusals
from clantune_scale.config.deepspeed_values import AUTO, block_of, is_on, shown

# What DeepSpeed 0.19 raises on; `tests/config/test_deepspeed_limits.py` compares them with the installed version's.
REMOVED_KEYS = frozenset(
    (
        "nebula",
        "compression_training",
        "amp",
        "quantize_training",
        "sparse_gradients",
        "eigenvalue",
        "sparse_attention",
        "elasticity",
        "graph_harvesting",
        "curriculum_learning",
        "progressive_layer_drop",
    )
)

#: Why no gradient of a validation loss can be taken beside training.
NO_VALIDATION_GRADIENTS = "DeepSpeed collects gradients in buffers of its own, which hold the loop's"

_HALF = ("float16", "fp16", "torch.float16", "half")


@dataclass(frozen=True)
class EngineFacts:
    """What decides whether a clan can run on an engine.

    Attributes:
        zero_stage: 0 to 3.
        fp16: whether the fp16 block is on.
        half_autocast: whether torch_autocast runs in float16.
        nvme_parts: those of ``offload_param`` and ``offload_optimizer`` that lie on NVMe.
        managed_accumulation: whether DeepSpeed itself counts micro-batches.
        multi_rank_buckets: ZeRO's ``use_multi_rank_bucket_allreduce``.
        has_moe: whether the model has mixture-of-experts layers, as far as it is known.
        has_stages: whether the model is a pipeline.
        autotp_size: AutoTP's tensor degree.
        sequence_size: Ulysses' sequence degree.
        auto_experts: whether DeepSpeed is to find and replace expert layers by itself (AutoEP).
    """

    zero_stage: int = 0
    fp16: bool = False
    half_autocast: bool = False
    nvme_parts: tuple[str, ...] = ()
    managed_accumulation: bool = True
    multi_rank_buckets: bool = True
    has_moe: bool = False
    has_stages: bool = False
    autotp_size: int = 1
    sequence_size: int = 1
    auto_experts: bool = False


def refusals(facts: EngineFacts) -> Iterator[str]:
    """A sentence and its remedy for every reason why a clan cannot run on the engine."""
    if facts.fp16 and facts.zero_stage == 0:
        yield (
            "fp16 with ZeRO stage 0 does not scale its loss in DeepSpeed 0.19 and trains on wrong gradients. "
            "Set zero_optimization.stage to 1 or more, or use bf16."
        )
    if facts.half_autocast:
        yield (
            "torch_autocast with float16 scales the loss by a scaler of each member's own, and gradients of different "
            "scales cannot be averaged. Set torch_autocast.dtype to bfloat16, or use the fp16 block."
        )
    if facts.has_moe and facts.zero_stage == 3:
        yield (
            "zero_optimization.stage is 3, and DeepSpeed's mixture-of-experts layers run only under 0 to 2. "
            "Set it to 2 or less."
        )
    if facts.has_stages and facts.zero_stage > 1:
        yield (
            f"zero_optimization.stage is {facts.zero_stage}, and DeepSpeed's pipeline engine takes only 0 and 1. "
            f"Set it to 1."
        )
    if facts.has_stages and facts.autotp_size > 1:
        yield (
            f"tensor_parallel.autotp_size is {facts.autotp_size} for a pipeline, whose groups AutoTP would replace by "
            f"its own. Leave it out, or build the PipelineModule on a topology with a model axis."
        )
    if facts.sequence_size > 1:
        yield (
            f"the sequence-parallel degree is {facts.sequence_size}, and a clan was not tried with sequence-parallel "
            f"members. Set sequence_parallel_size to 1."
        )
    if facts.auto_experts:
        yield (
            "expert_parallel is enabled, and a clan was not tried with layers that DeepSpeed replaces by expert layers "
            "of its own. Disable it, or build the model with deepspeed.moe.layer.MoE."
        )
    if facts.nvme_parts:
        yield (
            f"zero_optimization.{facts.nvme_parts[0]}.device is nvme, and a member's state must be in memory to be "
            f"cloned. Set it to cpu or none."
        )
    if not facts.managed_accumulation:
        yield (
            "managed_gradient_accumulation is false, so only the caller knows where a step ends, and the clan "
            "plans its phases in steps. Leave it at its default, true."
        )
    if facts.zero_stage in (1, 2) and not facts.multi_rank_buckets:
        yield (
            "zero_optimization.use_multi_rank_bucket_allreduce is false, and then each rank reduces only what it "
            "owns, which the clan cannot average. Leave it at its default, true."
        )


def facts_from_config(ds_config: Mapping[str, Any]) -> EngineFacts:
    """The facts as a DeepSpeed config states them."""
    zero = block_of(ds_config, "zero_optimization")
    autocast = block_of(ds_config, "torch_autocast")
    stages, autotp_size = degrees_from_config(ds_config)
    return EngineFacts(
        zero_stage=zero_stage(ds_config),
        fp16=is_on(ds_config, "fp16"),
        half_autocast=is_on(ds_config, "torch_autocast") and str(autocast.get("dtype")) in _HALF,
        nvme_parts=tuple(
            part for part in ("offload_param", "offload_optimizer") if block_of(zero, part).get("device") == "nvme"
        ),
        managed_accumulation=bool(ds_config.get("managed_gradient_accumulation", True)),
        multi_rank_buckets=bool(zero.get("use_multi_rank_bucket_allreduce", True)),
        has_stages=stages > 1,
        autotp_size=autotp_size,
        sequence_size=_degree(ds_config, "sequence_parallel_size"),
        auto_experts=is_on(ds_config, "expert_parallel"),
    )


def degrees_from_config(ds_config: Mapping[str, Any]) -> tuple[int, int]:
    """(pipeline stages, AutoTP's tensor shards) of a member as a DeepSpeed config states them; 1 if it does not."""
    stages = _degree(block_of(ds_config, "pipeline"), "stages")
    return stages, _degree(block_of(ds_config, "tensor_parallel"), "autotp_size")


def _degree(block: Mapping[str, Any], key: str) -> int:
    value = block.get(key, 1)
    return value if isinstance(value, int) and value > 1 else 1


def zero_stage(ds_config: Mapping[str, Any]) -> int:
    """ZeRO's stage; 0 if the config gives no number. The old style, ``"zero_optimization": true``, means 1."""
    if ds_config.get("zero_optimization") is True:
        return 1
    stage = block_of(ds_config, "zero_optimization").get("stage", 0)
    return stage if isinstance(stage, int) else 0


def dtype_of(ds_config: Mapping[str, Any]) -> str:
    """``"fp16"``, ``"bf16"`` or ``"fp32"``: what the model computes in."""
    if is_on(ds_config, "fp16"):
        return "fp16"
    return "bf16" if is_on(ds_config, _bf16_block(ds_config)) else "fp32"


def config_refusals(ds_config: Mapping[str, Any]) -> Iterator[str]:
    """Everything in a DeepSpeed config, its ``clantune`` block aside, that DeepSpeed or the clan will refuse."""
    for key in sorted(REMOVED_KEYS & ds_config.keys()):
        yield f"{key!r} was removed from DeepSpeed 0.19, which raises on it. Delete it."
    for key in sorted(REMOVED_ZERO_KEYS & block_of(ds_config, "zero_optimization").keys()):
        yield f"zero_optimization.{key} was removed from DeepSpeed 0.19, which raises on it. Delete it."
    stage = block_of(ds_config, "zero_optimization").get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3, AUTO):
        yield f"zero_optimization.stage is {shown(stage)}. Set it to 0, 1, 2 or 3."
    if is_on(ds_config, "fp16") and is_on(ds_config, _bf16_block(ds_config)):
        yield "fp16 and bf16 are both enabled, and DeepSpeed refuses that. Keep one."
    if str(ds_config.get("gradient_allreduce_op", "mean")).lower() == "sum":
        yield "gradient_allreduce_op is 'sum', and the clan averages over its members. Leave it at its default, mean."
    yield from schema_refusals(ds_config)
    yield from optimizer_refusals(ds_config)
    yield from scheduler_refusals(ds_config)
    yield from refusals(facts_from_config(ds_config))


def _bf16_block(ds_config: Mapping[str, Any]) -> str:
    """Its name: DeepSpeed still reads the old one if the new one is missing."""
    return "bf16" if ds_config.get("bf16") is not None else "bfloat16"
