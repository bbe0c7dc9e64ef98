"""The keys and types that DeepSpeed 0.19 checks, and raises on; and top-level keys that it would ignore without a word.

The tables mirror DeepSpeed's own models, so that a config is checked without DeepSpeed and in milliseconds.
``tests/config/test_deepspeed_schema.py`` compares them with the installed version's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model
from pydantic_core import ErrorDetails

from clantune_scale.config.deepspeed_values import AUTO, block_of, is_number, is_on, number_of, shown
from clantune_scale.core.spelling import did_you_mean, nearest

_Size = Annotated[int, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


class _Device(str, Enum):
    none = "none"
    cpu = "cpu"
    nvme = "nvme"


_OFFLOAD_PARAM: dict[Any, str] = {
    _Device: "device",
    Path | None: "nvme_path",
    _Size: "buffer_count buffer_size max_in_cpu",
    bool: "pin_memory",
}
_OFFLOAD_OPTIMIZER: dict[Any, str] = {
    _Device: "device",
    Path | None: "nvme_path",
    _Size: "buffer_count",
    bool: "pin_memory pipeline_read pipeline_write fast_init super_offload",
    _Share: "ratio cpuadam_cores_perc",
}
_ZERO: dict[Any, str] = {
    bool: (
        "contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions compute_grad_norm "
        "load_from_fp32_weights elastic_checkpoint gather_16bit_weights_on_model_save "
        "stage3_gather_16bit_weights_on_model_save use_all_reduce_for_fetch_params "
        "stage3_use_all_reduce_for_fetch_params allgather_sequential stage3_allgather_sequential "
        "stage3_gather_fp16_weights_on_model_save ignore_unused_parameters legacy_stage1 round_robin_gradients "
        "parameter_alignment zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients "
        "memory_efficient_linear pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings "
        "enable_sanity_checks save_muon_momentum_buffer_in_memory"
    ),
    bool | None: "overlap_comm cpu_offload_param cpu_offload_use_pin_memory cpu_offload",
    Annotated[int, Field(gt=0)]: "reduce_bucket_size",
    _Size: (
        "allgather_bucket_size sub_group_size prefetch_bucket_size stage3_prefetch_bucket_size "
        "param_persistence_threshold stage3_param_persistence_threshold model_persistence_threshold "
        "stage3_model_persistence_threshold max_live_parameters stage3_max_live_parameters max_reuse_distance "
        "stage3_max_reuse_distance zero_hpz_partition_size"
    ),
    int: "module_granularity_threshold stage3_module_granularity_threshold",
    # Looked at elsewhere: the stage by a sentence of its own, the offload blocks as blocks of theirs.
    Any: "stage offload_param offload_optimizer zenflow leaf_module",
}
_FP16: dict[Any, str] = {
    bool: "enabled auto_cast consecutive_hysteresis fp16_master_weights_and_grads",
    Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_no_truth_value)]: "loss_scale",
    int: "initial_scale_power hysteresis",
    Annotated[int, BeforeValidator(_no_truth_value)]: "loss_scale_window min_loss_scale",
}
_BF16: dict[Any, str] = {
    bool: ("enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states")
}
_MONITOR: dict[Any, str] = {bool: "enabled", str: "output_path job_name"}
_TABLES: dict[str, dict[Any, str]] = {
    "zero_optimization": _ZERO,
    "zero_optimization.offload_param": _OFFLOAD_PARAM,
    "zero_optimization.offload_optimizer": _OFFLOAD_OPTIMIZER,
    "fp16": _FP16,
    "bf16": _BF16,
    "tensorboard": _MONITOR,
    "csv_monitor": _MONITOR,
    "wandb": {bool: "enabled", str | None: "group team", str: "project"},
    "compile": {
        bool: (
            "deepcompile autoep_non_moe free_activation offload_activation offload_activation_pin_memory "
            "offload_opt_states double_buffer symmetric_memory debug_log offload_parameters sync_before_reduce "
            "sync_after_reduce sync_before_allgather sync_after_allgather keep_int_input_tensors keep_all_input_tensors"
        ),
        int: "free_activation_threshold",
        list[Literal["z1", "z3", "autosp", "autotp"]] | None: "passes",
    },
    "comms_logger": {bool: "enabled prof_all verbose debug", list: "prof_ops"},
}
#: The blocks whose every key DeepSpeed knows, by their path in the config.
CHECKED_BLOCKS = tuple(_TABLES)
# DeepSpeed takes null for these.
_MAY_BE_NULL = ("bf16", "zero_optimization.offload_param", "zero_optimization.offload_optimizer")

#: Keys of ``zero_optimization`` that DeepSpeed raises on by name.
REMOVED_ZERO_KEYS = frozenset(("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"))

#: Top-level keys with a number or a truth value. DeepSpeed does not look at their types, and fails in training.
NUMBERS = ("gradient_clipping", "gradient_predivide_factor", "steps_per_print")
FLAGS = (
    "prescale_gradients", "wall_clock_breakdown", "memory_breakdown", "dump_state", "disable_allgather",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "dataloader_drop_last",
    "managed_gradient_accumulation",
)  # fmt: skip
#: The other top-level keys that DeepSpeed reads.
OTHERS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer", "scheduler",
    "zero_optimization", "fp16", "bf16", "bfloat16", "torch_autocast", "communication_data_type",
    "seq_parallel_communication_data_type", "gradient_allreduce_op", "data_types", "tensorboard", "wandb", "comet",
    "csv_monitor", "comms_logger", "flops_profiler", "activation_checkpointing", "checkpoint", "autotuning", "aio",
    "hybrid_engine", "pipeline", "data_efficiency", "compile", "timers", "tensor_parallel", "expert_parallel",
    "weight_quantization", "vocabulary_size", "disable_python_gc", "log_level", "sequence_parallel_size",
    "data_parallel_size", "datastates_ckpt",
)  # fmt: skip


def schema_refusals(ds_config: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for every key of a checked block that DeepSpeed does not know, and every value of another type."""
    for path in CHECKED_BLOCKS:
        *outer, name = path.split(".")
        holder = ds_config.get(outer[0]) if outer else ds_config
        if not isinstance(holder, Mapping) or name not in holder:
            continue
        block = holder[name]
        if isinstance(block, Mapping):
            yield from _block_refusals(path, block)
        elif not _may_be(path, block):
            yield f"{path} is {shown(block)}, not an object. Write its keys in {{ }}, or delete it."
    yield from _pair_refusals(ds_config)
    for key in (*NUMBERS, *FLAGS):
        if key in ds_config and ds_config[key] != AUTO:
            yield from _scalar_refusals(key, ds_config[key])


def _pair_refusals(ds_config: Mapping[str, Any]) -> Iterator[str]:
    """What DeepSpeed raises on for two values together."""
    zero, fp16, bf16 = (block_of(ds_config, name) for name in ("zero_optimization", "fp16", "bf16"))
    stage = zero.get("stage", 0)
    if is_on(ds_config, "fp16") and number_of(fp16, "loss_scale", 0) == 0:
        for key in ("loss_scale_window", "min_loss_scale"):
            if number_of(fp16, key, 1) <= 0:
                yield f"fp16.{key} is {shown(fp16[key])}, and a dynamic loss scale needs one above 0. Raise it."
    if zero.get("compute_grad_norm") is False and stage not in (1, 2):
        yield (
            f"zero_optimization.compute_grad_norm is false, and the stage is {shown(stage)}. DeepSpeed takes that only "
            f"for 1 and 2. Delete it."
        )
    if number_of(block_of(zero, "offload_optimizer"), "ratio", 1) < 1 and stage != 3:
        yield "zero_optimization.offload_optimizer.ratio is below 1, which only stage 3 can do. Delete it."
    for block, name in ((fp16, "fp16"), (bf16, "bf16")):
        if block.get(f"{name}_master_weights_and_grads") is True and stage not in (1, 2, 3):
            yield f"{name}.{name}_master_weights_and_grads is true, which needs ZeRO. Set zero_optimization.stage to 1."
    if bf16.get("bf16_optimizer_states") is True and bf16.get("bf16_master_weights_and_grads") is not True:
        yield "bf16.bf16_optimizer_states is true. Set bf16.bf16_master_weights_and_grads to true too, or delete it."


def _may_be(path: str, value: Any) -> bool:
    """Whether DeepSpeed takes another value than an object for the block. It drops an inner one that is "auto"."""
    is_old_style = path == "zero_optimization" and isinstance(value, bool)
    return is_old_style or (value is None and path in _MAY_BE_NULL) or ("." in path and value == AUTO)


def ignored_keys(ds_config: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for every top-level key that is nearly one of DeepSpeed's, which would ignore it."""
    known = (*NUMBERS, *FLAGS, *OTHERS)
    for key in ds_config:
        meant = nearest(str(key), known, cutoff=0.85)
        if key not in known and meant is not None and meant not in ds_config:
            yield f"{key!r} is no key that DeepSpeed reads: it has no effect. Did you mean {meant!r}?"


def _block_refusals(path: str, block: Mapping[str, Any]) -> Iterator[str]:
    for key in block:
        if f"stage3_{key}" in block and str(key) in _model_of(path).model_fields:
            yield f"{path} has {key} and stage3_{key}, two names of one key, and DeepSpeed raises on that. Keep one."
    try:
        known = {str(key): value for key, value in block.items() if value != AUTO}
        _model_of(path).model_validate({key: value for key, value in known.items() if key not in REMOVED_ZERO_KEYS})
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            yield _sentence(path, detail)


def _sentence(path: str, detail: ErrorDetails) -> str:
    key = str(detail["loc"][0])
    if detail["type"] == "extra_forbidden":
        fields = _model_of(path).model_fields
        return (
            f"{path}.{key} is no key of DeepSpeed 0.19, which raises on it.{did_you_mean(key, fields) or ' Delete it.'}"
        )
    demand = detail["msg"].removeprefix("Value error, ").replace("Input should be", "should be").rstrip(".")
    return (
        f"{path}.{key} is {shown(detail['input'])}, and {demand}. Change it, or delete the key for DeepSpeed's default."
    )


def _scalar_refusals(key: str, value: Any) -> Iterator[str]:
    if key in FLAGS:
        if not isinstance(value, bool | int) and not (value is None and key != "wall_clock_breakdown"):
            yield f"{key} is {shown(value)}, and DeepSpeed takes a truth value. Write true or false, without quotes."
    elif value is None and key == "steps_per_print":
        return
    elif not is_number(value) or math.isnan(value) or value < 0:
        yield f"{key} is {shown(value)}. Write a number of at least 0, without quotes, or delete the key."


@cache
def _model_of(path: str) -> type[BaseModel]:
    """A model of the block: every key optional, no other allowed."""
    fields: dict[str, Any] = {key: (kind, None) for kind, keys in _TABLES[path].items() for key in keys.split()}
    settings = ConfigDict(extra="forbid", protected_namespaces=())
    return create_model(path.replace(".", "_"), __config__=settings, **fields)
