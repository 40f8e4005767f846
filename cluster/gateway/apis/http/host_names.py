"""The check of the header Host at a gateway without `auth`, against DNS rebinding.

Problem: without `auth` everybody who reaches a port may use it. The ports are on loopback, but a web page can make the
browser of this machine reach them: the page's own name, such as evil.example, first resolves to the page's server and
then to 127.0.0.1. Its requests are then same-origin ones, except that Host holds the page's name.

Method: answer only at names that nobody can register: addresses, localhost, names without a dot, those of services in
Kubernetes and of the host of a container, this host's own name, and the names in `gateway.host_names`. Browsers reach
no port of gRPC, since they speak HTTP/2 only over TLS with a certificate of the page's name.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from typing import Final

from cluster.api.outcomes import quoted
from cluster.gateway.apis.http.body import Refused
from cluster.gateway.apis.http.exchange import ApiForm, Application, Exchange, Receive, Scope, Send
from cluster.gateway.apis.http.protocol import CONNECTION

_HOST: Final = re.compile(r"(?:\[([0-9a-f.]*:[0-9a-f.:]*)\]|([^:\[\]]*))(?::[0-9]*)?")
_SERVICES: Final = (".svc", ".svc.cluster.local", "host.docker.internal", "host.containers.internal")
_LABEL: Final = re.compile(r"[a-z0-9_-]+")
MAX_KNOWN: Final = 256
ANY_HOST: Final = ("/health", "/ready")
"""Paths that load balancers ask for under any name, and that tell nothing."""


def host_name(host: str) -> str:
    """Return the name or address in a header `host`, in lower case and without the port; "" if the header is not
    valid."""
    match = _HOST.fullmatch(host.lower())
    return (match[1] or match[2].removesuffix(".")) if match else ""


def is_local(name: str) -> bool:
    """Return whether a name is an IP address, or one that every resolver resolves to this host."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
    return True


class HostNames:
    """The names at which the HTTP ports of a gateway without `auth` answer."""

    def __init__(self, configured: Iterable[str]) -> None:
        self._names = {*filter(None, configured), socket.gethostname().lower()}
        self._known = {b""}
        """Headers that are allowed. Programs may send an empty one, browsers do not."""

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Raise Refused if the header Host holds a name that another site could have."""
        host = next((value for name, value in headers if name == b"host"), b"")
        if host in self._known:
            return
        name = host_name(text := host.decode("latin-1"))
        if not (is_local(name) or name in self._names or _LABEL.fullmatch(name) or name.endswith(_SERVICES)):
            raise misdirected(text)
        if len(self._known) < MAX_KNOWN:
            self._known.add(host)


def misdirected(host: str) -> Refused:
    """Return the error about a header `host`."""
    return Refused(
        421,
        "misdirected",
        f"without `auth` this gateway does not answer at {quoted(host)}, since another site could have that name: use "
        "an IP address or localhost, or add the name to gateway.host_names",
    )


def at_own_hosts(app: Application, names: HostNames, form: ApiForm) -> Application:
    """Return an application that refuses requests for other hosts, except for ANY_HOST and the console, which has a
    check of its own."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            names.check(scope["headers"])
        except Refused as refused:
            path = scope.get("path", "")
            if path not in ANY_HOST and not path.startswith("/console/"):
                scope[CONNECTION].charge_refusal()
                await Exchange(form, scope, receive, send).refuse(refused)
                return
        await app(scope, receive, send)

    return checked
