"""Which errors mean that another process is gone, and not that this one did something wrong."""

from __future__ import annotations

import re

import torch.distributed as dist

# Gloo's errors are plain RuntimeErrors. Most name the place in its source: [.../gloo/transport/tcp/pair.cc:553].
_GLOO = re.compile(
    r"\[\S*gloo/[\w./]+\.(?:cc|h):\d+\]|^Application timeout caused pair closure|^Gloo connectFullMesh failed"
    r"|failed to pass monitoredBarrier"
)


def is_peer_failure(error: BaseException) -> bool:
    """Whether a collective, a message or the store failed. Errors that a user's code raised are none, whatever caused
    them: who wraps an error wants to be the one to say how the process ends."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and _GLOO.search(str(error)) is not None


def in_short(error: BaseException, limit: int = 300) -> str:
    """An error in one line."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= limit else text[: limit - 3] + "..."
