"""DeepSpeed members: ZeRO 0 to 3, fp32, bf16 and fp16; pipelines, tensor shards and experts."""

from clantune_scale.core.extras import is_installed, missing

if not is_installed("deepspeed"):
    raise missing("deepspeed", needed_by="clantune_scale.initialize()")

from clantune_scale.backends.deepspeed.engine import DeepSpeedBackend
from clantune_scale.backends.deepspeed.pipeline import PipelineBackend

__all__ = ["DeepSpeedBackend", "PipelineBackend"]
