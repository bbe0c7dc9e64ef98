"""DeepSpeed members: ZeRO 0 to 3, fp32, bf16 and fp16."""

from clantune_scale.backends.deepspeed.engine import DeepSpeedBackend

__all__ = ["DeepSpeedBackend"]
