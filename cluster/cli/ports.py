"""The ports of a local cluster: those left open (port 0) are chosen, and all are checked before anything starts."""

from __future__ import annotations

import contextlib
import socket
from typing import Any

import psutil

from cluster.config import Config


class PortTaken(Exception):
    """A listener's address is in use, or is none of this machine's; the message names both."""


def decide(config: Config) -> Config:
    """The configuration with every port 0 replaced by a free one. Raises PortTaken for addresses that cannot be had."""
    listen = config.gateway.listen.model_dump()
    with contextlib.ExitStack() as held:
        for name, address in listen.items():
            host, port = split(address)
            listener = held.enter_context(_bind(name, address, host, port))
            listen[name] = f"{address.rsplit(':', 1)[0]}:{listener.getsockname()[1]}"
    gateway = config.gateway.model_copy(update={"listen": type(config.gateway.listen)(**listen)})
    return config.model_copy(update={"gateway": gateway})


def split(address: str) -> tuple[str, int]:
    """host:port, the host without IPv6's brackets."""
    host, port = address.rsplit(":", 1)
    return host.strip("[]"), int(port)


def _bind(name: str, address: str, host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise PortTaken(f"gateway.listen.{name}: {address}: {error}") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what a closed connection left behind is no one
    try:
        listener.bind(target)
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise PortTaken(
            f"gateway.listen.{name}: {address} cannot be had ({error.strerror}){_owner(port)}; "
            "end that process, or set another port (0 picks a free one)"
        ) from None
    return listener


def _owner(port: int) -> str:
    """Who listens there, as far as this user may see."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            address: Any = connection.laddr
            if connection.status == psutil.CONN_LISTEN and connection.pid and address.port == port:
                return f": process {connection.pid} ({psutil.Process(connection.pid).name()}) listens there"
    return ""
