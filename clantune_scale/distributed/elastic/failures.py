"""Which errors the clan can restart from: another process is gone, or a transferred state is inconsistent."""

from __future__ import annotations

import re

import torch.distributed as dist

from clantune_scale.errors import TransferError

# Gloo's errors are plain RuntimeErrors. Most name a line of its source: [.../gloo/transport/tcp/pair.cc:553].
_GLOO = re.compile(
    r"\[\S*gloo/[\w./]+\.(?:cc|h):\d+\]|^Application timeout caused pair closure|^Gloo connectFullMesh failed"
    r"|failed to pass monitoredBarrier"
)


def peer_failure(error: BaseException) -> BaseException | None:
    """The failure of a collective, a message, the store or a transfer behind ``error``; None for any other error.

    A failed transfer is raised on all ranks of the clan at once. The last committed round restores the inconsistent
    member together with all others.

    An error that the user's code raised returns None, whatever its cause: code that wraps an error decides itself how
    the process ends.
    """
    if isinstance(error, dist.DistError | TransferError):
        return error
    if type(error) is RuntimeError:
        return error if _GLOO.search(str(error)) else None
    return None


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error's type and text in one line of at most ``limit`` characters."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= limit else text[: limit - 3] + "..."
