"""The ports of a local cluster: those left open (port 0) are chosen, and all are checked before anything starts."""

from __future__ import annotations

import contextlib
import socket
from typing import Any

import psutil

from cluster.config.gateway import MAX_PORT, Listen
from cluster.config.schema import Config

TRIES = 50


class PortTaken(Exception):
    """A listener's address is in use, or is none of this machine's; the message names both."""


def decide(config: Config) -> Config:
    """The configuration with every port 0 replaced by a free one. Raises PortTaken for addresses that cannot be had.

    With several gateway processes the ports of all are looked at: an open one becomes a number above which theirs,
    too, are free.
    """
    listen, last = config.gateway.listen, config.gateway.processes - 1
    with contextlib.ExitStack() as held:
        for name in type(listen).model_fields:
            tries = TRIES if split(getattr(listen, name))[1] == 0 and last else 1
            listen = _decide_one(held, listen, name, last, tries)
    gateway = config.gateway.model_copy(update={"listen": listen})
    return config.model_copy(update={"gateway": gateway})


def _decide_one(held: contextlib.ExitStack, listen: Listen, name: str, last: int, tries: int) -> Listen:
    """`listen` with the port of one listener decided; what is bound meanwhile is closed with `held`."""
    address = getattr(listen, name)
    for left in reversed(range(tries)):
        with contextlib.ExitStack() as bound:
            port = bound.enter_context(_bind(name, address)).getsockname()[1]
            found = listen.model_copy(update={name: f"{address.rsplit(':', 1)[0]}:{port}"})
            others = {getattr(found.of(process), name) for process in range(1, last + 1)} - {getattr(found, name)}
            try:
                for other in sorted(others):
                    bound.enter_context(_bind(name, other))
            except PortTaken:
                if not left:
                    raise
                continue
            held.push(bound.pop_all())
            return found
    raise AssertionError("the last try returns or raises")


def split(address: str) -> tuple[str, int]:
    """host:port, the host without IPv6's brackets."""
    host, port = address.rsplit(":", 1)
    return host.strip("[]"), int(port)


def _bind(name: str, address: str) -> socket.socket:
    host, port = split(address)
    if port > MAX_PORT:
        raise PortTaken(f"gateway.listen.{name}: {address}: no port is above {MAX_PORT}")
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
