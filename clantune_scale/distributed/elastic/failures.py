"""Which errors the clan can start again from: another process is gone, or a state did not arrive whole."""

from __future__ import annotations

import re

import torch.distributed as dist

from clantune_scale.errors import TransferError

# Gloo's errors are plain RuntimeErrors. Most name the place in its source: [.../gloo/transport/tcp/pair.cc:553].
_GLOO = re.compile(
    r"\[\S*gloo/[\w./]+\.(?:cc|h):\d+\]|^Application timeout caused pair closure|^Gloo connectFullMesh failed"
    r"|failed to pass monitoredBarrier"
)


def peer_failure(error: BaseException) -> BaseException | None:
    """The failure of a collective, a message, the store or a transfer that ``error`` is; None for something else.

    A transfer that failed is known to all ranks of the clan at once, and a torn member is whole again from the last
    committed round, as all others then are.

    Errors that a user's code raised are something else, whatever caused them: who wraps an error wants to be the one
    to say how the process ends.
    """
    if isinstance(error, dist.DistError | TransferError):
        return error
    if type(error) is RuntimeError:
        return error if _GLOO.search(str(error)) else None
    # Torch's logger of failed collectives asks for the group's backend, which it knows of the world's groups alone,
    # and so fails itself.
    is_loggers = type(error) is ValueError and "is not initialized in the world group map" in str(error)
    return peer_failure(error.__context__) if is_loggers and error.__context__ is not None else None


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error in one line."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= limit else text[: limit - 3] + "..."
