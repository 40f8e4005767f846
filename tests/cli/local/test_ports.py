"""The ports of a local cluster are chosen and checked before any process starts."""

from __future__ import annotations

import contextlib
import os
import socket

import pytest

from cluster.cli.local.ports import PortTaken, choose_ports
from cluster.config.document import ConfigError, parse
from cluster.config.schema import Config
from cluster.process.ports import EPHEMERAL


def config(processes: int = 1, **listen: str) -> Config:
    """Return a configuration with the given listeners. All other listeners have port 0."""
    ports = dict.fromkeys(("grpc", "http", "link", "admin", "metrics"), "127.0.0.1:0") | listen
    lines = "".join(f'    {name}: "{address}"\n' for name, address in ports.items())
    return parse(
        f"api_version: headrace/v1\nname: t\nmodels: []\ngateway:\n  processes: {processes}\n  listen:\n{lines}"
    )


def test_open_ports_are_chosen_all_different() -> None:
    """Each listener with port 0 gets a free port, and all listeners get different ports."""
    addresses = choose_ports(config()).gateway.listen.model_dump().values()
    ports = {int(address.rsplit(":", 1)[1]) for address in addresses}
    assert len(ports) == 5
    assert 0 not in ports
    for port in ports:
        with socket.socket() as free:
            free.bind(("127.0.0.1", port))


def test_chosen_ports_are_not_given_to_outgoing_connections() -> None:
    """Chosen ports lie outside the ephemeral range. So no outgoing connection can take a chosen port before its
    listener is started."""
    low, high = map(int, EPHEMERAL.read_text().split())
    for processes in (1, 3):
        addresses = choose_ports(config(processes)).gateway.listen.model_dump().values()
        assert all(not low <= int(address.rsplit(":", 1)[1]) <= high for address in addresses)


def test_a_taken_port_names_key_and_owner() -> None:
    """The error for a port in use names the listener's key and the process that uses the port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(PortTaken) as caught:
            choose_ports(config(admin=address))
    assert f"gateway.listen.admin: {address} is not available" in str(caught.value)
    assert f"process {os.getpid()} " in str(caught.value)


def test_one_port_for_two_listeners_is_told() -> None:
    """A configuration with the same address for two listeners is refused."""
    address = "127.0.0.1:50051"
    with pytest.raises(ConfigError, match=r"gateway\.listen\.admin: .* listen\.grpc's too"):
        config(grpc=address, admin=address)


def test_a_foreign_address_is_told() -> None:
    """An address of another machine is refused, and the error names the listener's key."""
    with pytest.raises(PortTaken, match=r"gateway\.listen\.metrics: 192\.0\.2\.1:9400"):
        choose_ports(config(metrics="192.0.2.1:9400"))


def test_open_ports_are_chosen_for_all_processes() -> None:
    """With several gateway processes, every chosen port is free, and no two ports are equal."""
    decided = choose_ports(config(processes=5)).gateway
    own = [address for i in range(5) for address in (decided.listen.of(i).link, decided.listen.of(i).metrics)]
    addresses = [*own, decided.listen.grpc, decided.listen.http, decided.listen.admin]
    assert len(set(addresses)) == len(addresses) == 13
    for address in addresses:
        socket.create_server(("127.0.0.1", int(address.rsplit(":", 1)[1]))).close()  # fails if another listens
    assert not decided.open_port()


def test_a_port_that_a_later_process_cannot_have_is_told() -> None:
    """If the port of a second gateway process is in use, the error names the address of the second process."""
    with contextlib.ExitStack() as stack:
        port = _taken_with_a_free_one_below(stack, 9)
        with pytest.raises(PortTaken, match=rf"gateway\.listen\.link: 127\.0\.0\.1:{port} is not available"):
            choose_ports(config(processes=2, link=f"127.0.0.1:{port - 9}"))


def _taken_with_a_free_one_below(stack: contextlib.ExitStack, distance: int) -> int:
    """Return a port in use, with a free port `distance` below it. Both ports are below the ephemeral range."""
    for port in range(20000, 32000, distance + 1):
        taken, below = (stack.enter_context(socket.socket()) for _ in range(2))
        try:
            below.bind(("127.0.0.1", port - distance))
            taken.bind(("127.0.0.1", port))
        except OSError:
            continue
        below.close()
        taken.listen(1)
        return port
    pytest.fail("no two such ports")
