"""What a transport is: it moves bytes, and nobody takes its word for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch

from clantune_scale.config.schema import TransferConfig
from clantune_scale.transfer.route import Route
from clantune_scale.transfer.state import MemberState

# Shown what a rank received, as bytes and by number, before they are passed on: where a test breaks them.
OnReceived = Callable[[int, torch.Tensor], None]


class Transport(Protocol):
    """One way to bring a donor's tensors into another member's live ones.

    Attributes:
        on_received: called with each piece of bytes that arrives, where it is set.
    """

    on_received: OnReceived | None

    def move(self, state: MemberState, route: Route) -> str | None:
        """Sends, receives and passes on the tensors' bytes; all ranks of the column call it.

        Args:
            state: this rank's live state, written in place where it receives. Scalars are not the transport's.
            route: who gives to whom.

        Returns:
            Why nothing usable arrived here, where the transport noticed. That it noticed nothing proves nothing:
            digests of both ends are compared afterwards.
        """


def build(config: TransferConfig, *, runs: Path) -> Transport:
    """The transport that a config names.

    Args:
        config: the block's ``transfer`` part.
        runs: the folder of runs, under which files are exchanged where the config names no folder.
    """
    # Torch's checkpoint package takes a second to import: only who uses it pays.
    if config.transport == "dcp_files":
        from clantune_scale.transfer.dcp_files import DcpFilesTransport

        return DcpFilesTransport(Path(config.directory) if config.directory is not None else runs / "transfers")
    from clantune_scale.transfer.peer import PeerTransport

    return PeerTransport(bucket_bytes=config.bucket_bytes)
