"""Where stores listen: on the address that the launcher gave, and nowhere else."""

from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from clantune_scale.distributed import world
from clantune_scale.distributed.bootstrap import own_address
from clantune_scale.distributed.store import serve
from clantune_scale.errors import TopologyError
from tests.ranks import run_ranks

# Of the kernel's tables of sockets: local address in hexadecimal, state; 0A is listening.
TABLES = [path for path in (Path("/proc/self/net/tcp"), Path("/proc/self/net/tcp6")) if path.exists()]
needs_tables = pytest.mark.skipif(not TABLES, reason="the kernel's table of sockets is read")
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def listening_at(port: int) -> set[str]:
    """The addresses on which somebody listens at a port."""
    rows = [row.split() for table in TABLES for row in table.read_text().splitlines()[1:]]
    places = [row[1].split(":") for row in rows if row[3] == "0A"]
    return {address for address, number in places if int(number, 16) == port}


@needs_tables
@pytest.mark.parametrize("address", ["127.0.0.1", "localhost"])
def test_a_store_listens_on_its_address_alone_and_answers(address):
    store = serve(address, 0, timeout_s=5)
    assert listening_at(store.port) and listening_at(store.port) <= LOOPBACK
    client = TCPStore(address, store.port, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
    client.set("key", "value")
    assert store.get("key") == b"value"


@needs_tables
def test_torchs_own_would_listen_everywhere():
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5), wait_for_workers=False)
    assert not listening_at(store.port) <= LOOPBACK


def test_an_address_of_another_host_is_warned_of(monkeypatch):
    # 192.0.2.0/24 is for documentation: no host has it. What torch does after that is not looked at.
    monkeypatch.setattr("clantune_scale.distributed.store.TCPStore", lambda *args, **options: options)
    with pytest.warns(UserWarning, match=r"MASTER_ADDR 192\.0\.2\.1 .* is no address of rank 0's host"):
        assert "master_listen_fd" not in serve("192.0.2.1", 0, timeout_s=5)


def test_a_name_that_only_this_host_takes_for_itself_is_not_bound_to(monkeypatch):
    place = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: [place])
    monkeypatch.setattr("clantune_scale.distributed.store.TCPStore", lambda *args, **options: options)
    assert "master_listen_fd" not in serve("node7", 0, timeout_s=5)


def test_a_port_that_is_taken_is_said():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        environ = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with pytest.raises(TopologyError, match=r"rank 0 could not reach .*Address already in use.*open and free"):
            world.join(2, timeout_s=1, environ=environ)


def _ports_of_a_clan() -> list[tuple[int, set[str]]]:
    import os

    launcher = int(os.environ["MASTER_PORT"])
    clan = world.join(2, timeout_s=30)
    found = [(port, listening_at(port)) for port in (launcher, int(os.environ["MASTER_PORT"]))]
    clan.replica_group.gather_json(None)
    return found


@needs_tables
def test_the_stores_of_a_clan_listen_where_the_launcher_says():
    for found in run_ranks(2, _ports_of_a_clan):
        assert all(addresses == {"0100007F"} for _, addresses in found), found


def test_a_store_and_an_address_of_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this host has no IPv6")
    # What `MASTER_ADDR=::1` needs: rank 0's store there, the address of this host towards it, a client of the store.
    assert own_address("::1") == "::1" and own_address("127.0.0.1") == "127.0.0.1"
    store = serve("::1", 0, timeout_s=10)
    client = TCPStore("::1", store.port, is_master=False, timeout=timedelta(seconds=10), wait_for_workers=False)
    client.set("key", "value")
    assert store.get("key") == b"value"
