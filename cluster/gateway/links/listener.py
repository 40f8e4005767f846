"""The link's port, bound before the rest of a gateway is imported.

Workers dial again and again while a gateway starts. Those who come meanwhile wait in the port's queue and are heard
as soon as the link is served; else each would be refused and wait for its next try, up to two seconds.
"""

from __future__ import annotations

import socket

from cluster import http2
from cluster.config.schema import Config


def bind_link(config: Config, process: int = 0) -> socket.socket:
    """A socket that queues those who dial. Raises RuntimeError, naming the setting, when there is none to be had."""
    address = config.gateway.listen.of(process).link
    host, port = address.rsplit(":", 1)
    try:
        return http2.listening(host.strip("[]"), int(port))
    except OSError as error:
        raise RuntimeError(told_unbound("link", address, error)) from None


def told_unbound(name: str, address: str, error: OSError) -> str:
    """What is said of a listener whose address cannot be had."""
    return f"gateway.listen.{name}: {address} cannot be bound: {error.strerror}"
