"""The link port, bound before the rest of a gateway is imported.

Workers redial while a gateway starts. Their connections wait in the socket's backlog and are accepted as soon as the
gateway serves the port. If the port were unbound, each connection would be refused, and the worker would wait up to two
seconds before its next attempt.
"""

from __future__ import annotations

import socket

from cluster import http2
from cluster.config.schema import Config


def bind_link(config: Config, process: int = 0) -> socket.socket:
    """Bind the link port and return the listening socket. Raises RuntimeError if the address cannot be bound. The
    message names the setting that has the address."""
    address = config.gateway.listen.of(process).link
    host, port = address.rsplit(":", 1)
    try:
        return http2.listening_socket(host.strip("[]"), int(port))
    except OSError as error:
        raise RuntimeError(bind_failure("link", address, error)) from None


def bind_failure(name: str, address: str, error: OSError) -> str:
    """Return the error message for a listener whose address cannot be bound."""
    return f"gateway.listen.{name}: {address} cannot be bound: {error.strerror}"
