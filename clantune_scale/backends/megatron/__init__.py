"""Megatron-core members: tensor, pipeline and data parallelism, with its distributed optimizer or without."""

from clantune_scale.core.extras import is_installed, missing

if not is_installed("megatron.core"):
    raise missing("megatron.core", needed_by="clantune_scale.attach_megatron()")

from clantune_scale.backends.megatron.engine import MegatronBackend

__all__ = ["MegatronBackend"]
