"""A store on one address of this host. Torch's own listens on all of them, and asks nobody who he is."""

from __future__ import annotations

import errno
import ipaddress
import socket
import warnings
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore


def serve(address: str, port: int, *, timeout_s: float, multi_tenant: bool = False) -> TCPStore:
    """A store that is reached at ``address`` alone, where that is an address of this host.

    Args:
        address: what other ranks are told: an IP address or a name.
        port: 0 for any that is free.
        timeout_s: of the store's operations.
        multi_tenant: whether torch may attach to it when it is asked for a store on the same port.

    Raises:
        OSError: if the port is taken.
        torch.distributed.DistError: as ``TCPStore``.
    """
    options: dict[str, Any] = {}
    listener = _listener(address, port)
    if listener is not None:
        port = listener.getsockname()[1]
        # The store closes it.
        options["master_listen_fd"] = listener.detach()
    return TCPStore(
        address, port, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False,
        multi_tenant=multi_tenant, **options,
    )  # fmt: skip


def _listener(address: str, port: int) -> socket.socket | None:
    """A listening socket on the address; None where binding to it would keep other hosts out."""
    family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    if ipaddress.ip_address(place[0]).is_loopback and not _means_loopback(address):
        # Debian gives a host's own name an address that only itself can reach.
        return None
    try:
        return socket.create_server((place[0], port), family=family, backlog=socket.SOMAXCONN)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        warnings.warn(
            f"MASTER_ADDR {address} ({place[0]}) is no address of rank 0's host: the clan's store listens on all of "
            f"its addresses. Set MASTER_ADDR to the host's own, or keep port {port} from other networks.",
            UserWarning,
            stacklevel=4,
        )
        return None


def _means_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
