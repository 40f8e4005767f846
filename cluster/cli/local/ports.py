"""Choice of the ports of a local cluster. For each port that is configured as 0, a free port is chosen. All ports are
checked before any process starts."""

from __future__ import annotations

import contextlib
import socket
from typing import Any

import psutil

from cluster.config.gateway import MAX_PORT, Listen
from cluster.config.schema import Config
from cluster.process.ports import TRIES, candidate_ports


class PortTaken(Exception):
    """Error: a listener's address is in use or does not belong to this machine.

    The message names the setting and the address.
    """


def choose_ports(config: Config) -> Config:
    """Return the configuration with a free port instead of each port 0. Raises PortTaken if an address is not free.

    With several gateway processes, the ports of all processes are checked. The first process's ports determine the
    ports of the other processes, so a port is chosen only if the ports that follow from it are free too.
    """
    listen, last = config.gateway.listen, config.gateway.processes - 1
    with contextlib.ExitStack() as held:
        for name in type(listen).model_fields:
            tries = TRIES if split(getattr(listen, name))[1] == 0 and last else 1
            listen = _choose_port(held, listen, name, last, tries)
    gateway = config.gateway.model_copy(update={"listen": listen})
    return config.model_copy(update={"gateway": gateway})


def _choose_port(held: contextlib.ExitStack, listen: Listen, name: str, last: int, tries: int) -> Listen:
    """Return `listen` with a free port for the listener `name`, after at most `tries` attempts.

    The ports of the processes 1 to `last` follow from the chosen port, and are free too. All these ports stay bound
    until `held` is closed.
    """
    address = getattr(listen, name)
    for remaining in reversed(range(tries)):
        with contextlib.ExitStack() as bound:
            port = bound.enter_context(_bind_any(name, address)).getsockname()[1]
            chosen = listen.model_copy(update={name: f"{address.rsplit(':', 1)[0]}:{port}"})
            others = {getattr(chosen.of(process), name) for process in range(1, last + 1)} - {getattr(chosen, name)}
            try:
                for other in sorted(others):
                    bound.enter_context(_bind(name, other))
            except PortTaken:
                if not remaining:
                    raise
                continue
            held.push(bound.pop_all())
            return chosen
    raise AssertionError("the last try returns or raises")


def split(address: str) -> tuple[str, int]:
    """Split host:port into the host and the port. The brackets around an IPv6 host are removed."""
    host, port = address.rsplit(":", 1)
    return host.strip("[]"), int(port)


def _bind_any(name: str, address: str) -> socket.socket:
    """Bind an address and return the socket. For port 0, a free port is chosen."""
    host, port = address.rsplit(":", 1)
    for candidate in candidate_ports() if int(port) == 0 else ():
        with contextlib.suppress(PortTaken):
            return _bind(name, f"{host}:{candidate}")
    return _bind(name, address)


def _bind(name: str, address: str) -> socket.socket:
    host, port = split(address)
    if port > MAX_PORT:
        raise PortTaken(f"gateway.listen.{name}: {address}: the port must be at most {MAX_PORT}")
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise PortTaken(f"gateway.listen.{name}: {address}: {error}") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ports in TIME_WAIT count as free
    try:
        listener.bind(target)
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise PortTaken(
            f"gateway.listen.{name}: {address} is not available ({error.strerror}){_owner(port)}; "
            "end that process, or set another port (0 picks a free one)"
        ) from None
    return listener


def _owner(port: int) -> str:
    """Return text for a message about the process that listens on a port.

    The text is empty if this user may not see the process.
    """
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            address: Any = connection.laddr
            if connection.status == psutil.CONN_LISTEN and connection.pid and address.port == port:
                return f": process {connection.pid} ({psutil.Process(connection.pid).name()}) listens there"
    return ""
