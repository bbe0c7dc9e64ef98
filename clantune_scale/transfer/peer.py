"""The default transport: rank to rank down the column, straight into live tensors.

Several clones of one donor form a chain: each passes a bucket on while it receives the next, so that the donor
sends once however many receive. A rank needs room for two buckets beside its state.
"""

from __future__ import annotations

from typing import Any

import torch

from clantune_scale.transfer.route import Route
from clantune_scale.transfer.state import MemberState
from clantune_scale.transfer.transport import OnReceived

BUCKET_BYTES = 1 << 25
_TAG = 71


class PeerTransport:
    """Point-to-point messages of one bucket each.

    Args:
        bucket_bytes: size of a message.
    """

    def __init__(self, *, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.bucket_bytes = bucket_bytes
        self.on_received: OnReceived | None = None

    def move(self, state: MemberState, route: Route) -> str | None:
        before, after = route.before, route.after
        if before is None and after is None:
            return None
        sending: Any = None
        rooms = _Rooms(self.bucket_bytes)
        for number, pieces in enumerate(state.pieces(self.bucket_bytes)):
            group = route.group_for(pieces[0].device.type)
            buffer = rooms.next(pieces)
            if before is None:
                _gather(pieces, buffer)
            else:
                group.recv([buffer], before, _TAG).wait()
                if self.on_received is not None:
                    self.on_received(number, buffer)
            if sending is not None:
                sending.wait()
            sending = group.send([buffer], after, _TAG) if after is not None else None
            if before is not None and len(pieces) > 1:
                for piece, received in zip(pieces, buffer.split([p.numel() for p in pieces]), strict=True):
                    piece.copy_(received)
        if sending is not None:
            sending.wait()
        return None


class _Rooms:
    """Two buffers in turns: one is still being sent while the next is filled.

    They are kept over the whole transfer: allocated for each bucket, freed ones would add up in the host's allocator.

    Args:
        bucket_bytes: of each.
    """

    def __init__(self, bucket_bytes: int) -> None:
        self._bucket_bytes = bucket_bytes
        self._buffers: list[torch.Tensor] = []

    def next(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        """Where a bucket is put together: the live memory itself, where it is in one piece there."""
        if len(pieces) == 1:
            return pieces[0]
        if len(self._buffers) == 2:
            buffer = self._buffers.pop(0)
        else:
            buffer = torch.empty(self._bucket_bytes, dtype=torch.uint8, device=pieces[0].device)
        if buffer.device != pieces[0].device:
            buffer = torch.empty_like(buffer, device=pieces[0].device)
        self._buffers.append(buffer)
        return buffer[: sum(piece.numel() for piece in pieces)]


def _gather(pieces: list[torch.Tensor], buffer: torch.Tensor) -> None:
    if len(pieces) > 1:
        torch.cat(pieces, out=buffer)
