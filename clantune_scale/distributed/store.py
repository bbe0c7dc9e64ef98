"""A store that listens on one address of this host. Torch's own listens on all addresses, without authentication."""

from __future__ import annotations

import errno
import ipaddress
import socket
import warnings
from datetime import timedelta
from typing import Any

from torch.distributed import Store, TCPStore


def serve(address: str, port: int, *, timeout_s: float, multi_tenant: bool = False) -> TCPStore:
    """A store that listens on ``address`` only, if that is an address of this host.

    Args:
        address: the IP address or name that other ranks connect to.
        port: 0 for any free port.
        timeout_s: of the store's operations.
        multi_tenant: whether torch may attach to this store when a script asks for one on the same port.

    Raises:
        OSError: if the port is taken.
        torch.distributed.DistError: as ``TCPStore`` does.
    """
    options: dict[str, Any] = {}
    listener = _listener(address, port)
    if listener is not None:
        port = listener.getsockname()[1]
        # The store owns the descriptor from here on and closes it.
        options["master_listen_fd"] = listener.detach()
    return TCPStore(
        address, port, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False,
        multi_tenant=multi_tenant, **options,
    )  # fmt: skip


def own_connection(store: Store) -> Store:
    """A new connection to the same store. A call on a shared one would block behind another thread's call."""
    return store.clone()  # type: ignore[attr-defined]  # torch's stub of Store lacks the method.


def _listener(address: str, port: int) -> socket.socket | None:
    """A listening socket on the address. None if other hosts could not reach a socket that is bound to it."""
    family, _, _, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    if ipaddress.ip_address(place[0]).is_loopback and not _means_loopback(address):
        # Debian resolves a host's own name to 127.0.1.1, which no other host can reach.
        return None
    try:
        return socket.create_server((place[0], port), family=family, backlog=socket.SOMAXCONN)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        warnings.warn(
            f"MASTER_ADDR {address} ({place[0]}) is no address of rank 0's host, so the clan's store listens on all "
            f"addresses of that host. Set MASTER_ADDR to the host's own address, or block port {port} from other "
            f"networks.",
            UserWarning,
            stacklevel=4,
        )
        return None


def _means_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
