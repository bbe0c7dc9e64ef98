"""Settings of a DeepSpeed engine that a clan cannot run with."""

from __future__ import annotations

from typing import Any

import torch

from clantune_scale.backends.deepspeed.state import optimizer_kind
from clantune_scale.backends.torch.hidden_state import require_own_state
from clantune_scale.config.deepspeed_limits import EngineFacts, refusals
from clantune_scale.errors import ConfigError


def refuse_unsupported(engine: Any) -> None:
    """Refuses settings whose state or gradients this backend does not find.

    Args:
        engine: DeepSpeed's.

    Raises:
        ConfigError: if it has one.
    """
    optimizer_kind(engine)
    require_own_state([engine.basic_optimizer])
    facts = EngineFacts(
        zero_stage=engine.zero_optimization_stage(),
        fp16=engine.fp16_enabled(),
        half_autocast=engine.torch_autocast_enabled() and engine.torch_autocast_dtype() == torch.float16,
        nvme_parts=tuple(part for part in ("offload_param", "offload_optimizer") if _offloads_to_nvme(engine, part)),
        managed_accumulation=engine.managed_gradient_accumulation(),
        multi_rank_buckets=getattr(engine.optimizer, "use_multi_rank_bucket_allreduce", True),
        has_moe=engine.has_moe_layers,
        has_stages=engine.pipeline_parallelism,
        autotp_size=engine.autotp_size(),
        sequence_size=engine.sequence_parallel_size,
    )
    for refusal in refusals(facts):
        raise ConfigError(refusal)


def _offloads_to_nvme(engine: Any, part: str) -> bool:
    settings = engine.zero_offload_param() if part == "offload_param" else engine.zero_offload_optimizer()
    device = getattr(settings, "device", None)
    return str(getattr(device, "value", device)) == "nvme"
