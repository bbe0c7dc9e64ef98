"""The transport interface. A transport moves bytes; the digests of both ends verify them independently of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from clantune_scale.config.schema import TransferConfig
from clantune_scale.transfer.route import Route
from clantune_scale.transfer.state import MemberState

# Gets the number and the bytes of each piece that a rank received, before the rank passes it on. Tests damage it here.
OnReceived = Callable[[int, torch.Tensor], None]


class Transport(Protocol):
    """One way to move a donor's tensors into another member's live tensors.

    Attributes:
        on_received: is called with each piece of bytes that arrives; None for nothing.
    """

    on_received: OnReceived | None

    def move(self, state: MemberState, route: Route) -> str | None:
        """Sends, receives and forwards the tensors' bytes. All ranks of the replica group call it.

        Args:
            state: this rank's live state. A recipient writes it in place. The transport does not move scalars.
            route: the donors and recipients.

        Returns:
            Why the received bytes are unusable, if the transport noticed it. None is no proof: the digests of both
            ends are compared afterwards.
        """


def build(config: TransferConfig, *, runs: Path) -> Transport:
    """The transport that a config names.

    Args:
        config: the block's ``transfer`` section.
        runs: the folder of runs. Files are exchanged below it if the config names no folder.
    """
    # Torch's checkpoint package takes a second to import. Only the transport that uses it pays for that.
    if config.transport == "dcp_files":
        from clantune_scale.transfer.dcp_files import DcpFilesTransport

        return DcpFilesTransport(Path(config.directory) if config.directory is not None else runs / "transfers")
    from clantune_scale.transfer.peer import PeerTransport

    return PeerTransport(bucket_bytes=config.bucket_bytes)
