"""What public DeepSpeed configs have in common, and how one of them is described here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]
AUTO = "auto"


@dataclass(frozen=True)
class Case:
    """A file, how it is launched, and the right answer.

    Attributes:
        source: repository and file.
        config: without the clantune block.
        world_size, population_size: of the launch.
        batch: of a member: (samples, micro-batch, accumulation, data-parallel ranks); None if it cannot be known.
        errors, warnings: a part of each, in any order; none is left out.
        options: further words of the command line.
    """

    source: str
    config: Config
    world_size: int
    batch: tuple[int, int, int, int] | None
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    population_size: int = 4
    options: tuple[str, ...] = ()


def batch(train: Any = AUTO, micro: Any = AUTO, accumulation: Any = AUTO) -> Config:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return {key: value for key, value in zip(keys, (train, micro, accumulation), strict=True) if value is not None}


def scaled(enabled: Any = True, power: int | None = 16, **more: Any) -> Config:
    scaling = {"loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
    return {"enabled": enabled, **scaling, **({} if power is None else {"initial_scale_power": power}), **more}


def optimizer(kind: str, **params: Any) -> Config:
    return {"optimizer": {"type": kind, "params": params}}


def scheduler(kind: str, **params: Any) -> Config:
    return {"scheduler": {"type": kind, "params": params}}


NO_BATCH = ('train_batch_size and train_micro_batch_size_per_gpu and gradient_accumulation_steps are "auto"',)
NO_SCALE = "fp16 with ZeRO stage 0"
FILLED = ('"auto", which DeepSpeed does not fill in',)
ADAMW = optimizer("AdamW", lr=AUTO, betas=AUTO, eps=AUTO, weight_decay=AUTO)
WARMUP = scheduler("WarmupLR", warmup_min_lr=AUTO, warmup_max_lr=AUTO, warmup_num_steps=AUTO)
DECAY = scheduler("WarmupDecayLR", warmup_min_lr=AUTO, warmup_max_lr=AUTO, warmup_num_steps=AUTO, total_num_steps=AUTO)
ON_HOST = {"device": "cpu", "pin_memory": True}
BUCKETS = {"allgather_partitions": True, "allgather_bucket_size": 2e8, "reduce_scatter": True}
STAGE_2 = {"stage": 2, **BUCKETS, "reduce_bucket_size": 2e8, "overlap_comm": True, "contiguous_gradients": True}
STAGE_3 = {
    "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 1e9, "reduce_bucket_size": AUTO,
    "stage3_prefetch_bucket_size": AUTO, "stage3_param_persistence_threshold": AUTO,
    "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
}  # fmt: skip
OFFLOADED = {"offload_optimizer": ON_HOST, "offload_param": ON_HOST}
FROM_MEMORY = {"stage3_gather_16bit_weights_on_model_save": True}
PRINTS = {"gradient_clipping": AUTO, "steps_per_print": 2000, "wall_clock_breakdown": False}
BOTH_AUTO = {"fp16": scaled(AUTO), "bf16": {"enabled": AUTO}}
ONE_BIT = {"lr": 2e-4, "freeze_step": 2, "cuda-aware": True}

HF_2 = {**BOTH_AUTO, **ADAMW, **WARMUP, "zero_optimization": {**STAGE_2, "offload_optimizer": ON_HOST}, **PRINTS}
ALPACA = {
    "bf16": {"enabled": AUTO}, **ADAMW, **DECAY, **PRINTS,
    "zero_optimization": {**STAGE_3, **OFFLOADED, "stage3_gather_16bit_weights_on_model_save": False},
}  # fmt: skip
NEOX = {
    "gradient_clipping": 1.0, "fp16": {"enabled": True},
    "tensorboard": {"enabled": True, "output_path": "./logs", "job_name": "gptneox"},
    **scheduler("WarmupLR", warmup_min_lr=0, warmup_max_lr=0.00015, warmup_num_steps=5000),
}  # fmt: skip
NEOX_ZERO = {"contiguous_gradients": True, "cpu_offload": False}
MEGATRON = {"gradient_clipping": 1.0, "prescale_gradients": False, "fp16": scaled(power=11, loss_scale_window=500)}
AXOLOTL = {"bf16": {"enabled": AUTO}, "fp16": scaled(AUTO, power=32, auto_cast=False), "wall_clock_breakdown": False}
FACTORY_ZERO = {
    **BUCKETS, "allgather_bucket_size": 5e8, "reduce_bucket_size": 5e8, "overlap_comm": False,
    "contiguous_gradients": True, "round_robin_gradients": True,
}  # fmt: skip
FACTORY = {**BOTH_AUTO, "gradient_clipping": AUTO, "zero_allow_untested_optimizer": True}
BING = {"steps_per_print": 100, "gradient_clipping": 1.0, "wall_clock_breakdown": False}
BING_ADAM = {"lr": 2e-4, "weight_decay": 0.01, "bias_correction": False}
LAMB = {"weight_decay": 0.01, "bias_correction": False, "max_coeff": 0.3, "min_coeff": 0.01}
BLOOM = {
    **batch(2048, 2, None), "gradient_clipping": 1.0, "zero_optimization": {"stage": 0}, "bf16": {"enabled": True},
    "steps_per_print": 2000, "wall_clock_breakdown": False,
}  # fmt: skip
DOLLY = {
    "fp16": {"enabled": True}, "bf16": {"enabled": False}, **ADAMW, **WARMUP, **PRINTS,
    "zero_optimization": {**STAGE_3, **FROM_MEMORY, "offload_optimizer": ON_HOST},
}  # fmt: skip
LLAVA = {
    "fp16": scaled(AUTO), "bf16": {"enabled": True}, **ADAMW, **WARMUP, **PRINTS, "steps_per_print": 1e5,
    "zero_optimization": {**STAGE_3, **OFFLOADED, "gather_16bit_weights_on_model_save": True},
}  # fmt: skip
LORA_2 = {
    "bf16": {"enabled": AUTO}, **DECAY, **PRINTS,
    **optimizer("AdamW", lr=AUTO, weight_decay=AUTO, torch_adam=True, adam_w_mode=True),
    "zero_optimization": {**STAGE_2, "reduce_bucket_size": AUTO, "offload_optimizer": {"device": "cpu"}},
}  # fmt: skip
ALST = {
    "gradient_clipping": AUTO, "zero_optimization": {**STAGE_3, **OFFLOADED}, **ADAMW, **WARMUP,
    "sequence_parallel": {"enabled": True, "size": 4, "mode": "ulysses"},
    "bf16": scaled(auto_cast=False), "comms_logger": {"enabled": False}, "comms_config": {"verbose": False},
    "monitor_config": {"enabled": True, "csv_monitor": {"enabled": False}},
}  # fmt: skip
INFINITY = {
    "stage": 3, "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e8,
    "stage3_param_persitance_threshold": 1e5, "stage3_prefetch_bucket_size": 5e7, "reduce_bucket_size": 90000000,
    "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme_data", "buffer_count": 4, "pipeline_read": False},
    "offload_param": {"device": "nvme", "nvme_path": "/nvme_data", "max_in_cpu": 1, "pin_memory": True},
}  # fmt: skip
