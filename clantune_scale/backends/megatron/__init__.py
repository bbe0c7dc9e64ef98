"""Megatron-core members: tensor, pipeline and data parallelism, with its distributed optimizer or without."""

from clantune_scale.backends.megatron.engine import MegatronBackend

__all__ = ["MegatronBackend"]
