"""Members in a plain PyTorch loop: FSDP2 (with tensor parallelism or without) and DDP."""

from clantune_scale.backends.torch.ddp import DDPBackend
from clantune_scale.backends.torch.fsdp import FSDPBackend

__all__ = ["DDPBackend", "FSDPBackend"]
