"""The default transport: peer to peer, straight into live tensors.

Several recipients of one donor form a chain. Each forwards a message while it receives the next one, so the donor sends
once for any number of recipients. Large pieces go from live memory to live memory. Small pieces are packed together,
which needs a small buffer beside the state.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch

from clantune_scale.transfer.route import Route
from clantune_scale.transfer.state import MemberState
from clantune_scale.transfer.transport import OnReceived

BUCKET_BYTES = 1 << 25
_TAG = 71
# Copying a smaller piece into a buffer costs less than a message of its own.
_DIRECT_BYTES = 1 << 18
# Large enough that the latency of a message is small beside its transfer time.
_PACKED_BYTES = 1 << 22


class PeerTransport:
    """Point-to-point messages.

    Args:
        bucket_bytes: most bytes in one message.
    """

    def __init__(self, *, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.bucket_bytes = bucket_bytes
        self.on_received: OnReceived | None = None

    def move(self, state: MemberState, route: Route) -> str | None:
        before, after = route.before, route.after
        if before is None and after is None:
            return None
        sending: Any = None
        buffers = _SendBuffers(min(_PACKED_BYTES, self.bucket_bytes))
        for number, pieces in enumerate(messages(state, self.bucket_bytes)):
            group = route.group_for(pieces[0].device.type)
            buffer = buffers.next(pieces)
            if before is None:
                _gather(pieces, buffer)
            else:
                group.recv([buffer], before, _TAG).wait()
                if self.on_received is not None:
                    self.on_received(number, buffer)
            # One message in flight: it overlaps with the receipt of the next one.
            if sending is not None:
                sending.wait()
            sending = group.send([buffer], after, _TAG) if after is not None else None
            if before is not None and len(pieces) > 1:
                for piece, received in zip(pieces, buffer.split([p.numel() for p in pieces]), strict=True):
                    piece.copy_(received)
        if sending is not None:
            sending.wait()
        return None


def messages(state: MemberState, bucket_bytes: int) -> Iterator[list[torch.Tensor]]:
    """The state's bytes in order, by message: one large piece, or several consecutive small pieces.

    Args:
        state: of a donor or a recipient; both get the same messages.
        bucket_bytes: most bytes in one message.
    """
    for pieces in state.pieces(bucket_bytes):
        for is_large, run in groupby(pieces, key=lambda piece: piece.numel() >= _DIRECT_BYTES):
            together: list[torch.Tensor] = []
            for piece in run:
                if together and (is_large or sum(p.numel() for p in together) + piece.numel() > _PACKED_BYTES):
                    yield together
                    together = []
                together.append(piece)
            yield together


class _SendBuffers:
    """Two alternating buffers: one is being sent while the next is filled.

    They are reused during the whole transfer. Buffers that were allocated for each bucket and freed again would
    accumulate in the host's allocator.

    Args:
        num_bytes: size of each buffer.
    """

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self._buffers: list[torch.Tensor] = []

    def next(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        """[bytes] uint8: the memory of the next message: live memory for one piece, a buffer for several."""
        if len(pieces) == 1:
            return pieces[0]
        if len(self._buffers) == 2:
            buffer = self._buffers.pop(0)
        else:
            buffer = torch.empty(self._num_bytes, dtype=torch.uint8, device=pieces[0].device)
        if buffer.device != pieces[0].device:
            buffer = torch.empty_like(buffer, device=pieces[0].device)
        self._buffers.append(buffer)
        return buffer[: sum(piece.numel() for piece in pieces)]


def _gather(pieces: list[torch.Tensor], buffer: torch.Tensor) -> None:
    if len(pieces) > 1:
        torch.cat(pieces, out=buffer)
