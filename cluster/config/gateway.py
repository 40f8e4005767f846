"""The `gateway` section of cluster.yaml: listeners, certificates, queue bounds and resume."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from cluster.config.checks import listeners
from cluster.config.console import Console
from cluster.config.problems import Problem, raise_all
from cluster.config.section import Section


def is_loopback(address: str) -> bool:
    """Return whether `host:port` is reachable from this host only."""
    host = address.rsplit(":", 1)[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


MAX_PORT = 65_535


def check_address(value: str, least: int = 0) -> str:
    """Return `host:port` unchanged. Raises ValueError for a port below `least`, or an invalid port or host."""
    host, _, port = value.rpartition(":")
    if not least <= int(port) <= MAX_PORT:
        raise ValueError(f"{value}: a port is {least} to {MAX_PORT}")
    if host.startswith("[") or re.fullmatch(r"[0-9.]+", host):
        try:
            ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            raise ValueError(f"{value}: {host} is no IP address") from None
    elif not re.fullmatch(r"[A-Za-z0-9._-]+", host):
        raise ValueError(f"{value}: {host!r} is no host name")
    return value


HostName = Annotated[str, Field(pattern=r"^[a-z0-9_]([a-z0-9._-]{0,252}[a-z0-9_])?$")]
Address = Annotated[str, Field(pattern=r"^(\[[0-9a-fA-F:]+\]|[^:\s]+):[0-9]{1,5}$"), AfterValidator(check_address)]
# Process i > 0 listens on the configured port plus this offset plus i: by default on 50060+i and 9410+i.
LINK_PORT_OFFSET, METRICS_PORT_OFFSET = 8, 10


def _with_port_above(address: str, by: int) -> str:
    """Return the address with the port raised by `by`. Port 0 stays 0."""
    host, port = address.rsplit(":", 1)
    return f"{host}:{int(port) + by if int(port) else 0}"


class Listen(Section):
    """Listen addresses of a gateway, each `host:port`; port 0 picks a free port."""

    grpc: Address = "127.0.0.1:50051"
    """The gRPC API for callers. Off loopback it needs `auth` and `gateway.tls`."""
    http: Address = "127.0.0.1:8000"
    """OpenAI's HTTP API. Off loopback it needs `auth` and `gateway.tls`."""
    link: Address = "127.0.0.1:50052"
    """Workers and the controller connect here. Off loopback it needs `gateway.link_tls`."""
    admin: Address = "127.0.0.1:50053"
    """The admin API. Off loopback it needs `auth` and `gateway.tls`."""
    metrics: Address = "127.0.0.1:9400"
    """Prometheus metrics of this process."""

    def of(self, process: int) -> Listen:
        """Return the addresses of one process.

        All processes share `grpc` and `http`. Each process has a separate `link` and `metrics` address. Only process 0
        has `admin`.
        """
        if not process:
            return self
        own = {
            "link": _with_port_above(self.link, LINK_PORT_OFFSET + process),
            "metrics": _with_port_above(self.metrics, METRICS_PORT_OFFSET + process),
        }
        return self.model_copy(update=own)


class Tls(Section):
    """Certificate files for one side of a mutual TLS connection."""

    cert_file: Path
    """Certificate of this side, in PEM."""
    key_file: Path
    """Private key of the certificate, in PEM."""
    ca_file: Path
    """CA that must have signed the other side's certificate, in PEM."""


class LinkTls(Tls):
    """Certificate files of the link port. The file `revoked_serials_file` lists revoked certificates. It is read again
    when it changes."""

    revoked_serials_file: Path | None = None
    """Serial numbers of revoked certificates. Re-read when the file changes."""


class ClientTls(Section):
    """Certificate of the client and admin ports, re-read when the files change.

    `client_ca_file`: the CA of client certificates that authenticate callers (auth.client_certificates).
    `revoked_serials_file`: client certificates that are revoked."""

    cert_file: Path
    """Certificate of the gateway, in PEM."""
    key_file: Path
    """Private key of the certificate, in PEM."""
    client_ca_file: Path | None = None
    """CA of the client certificates that authenticate callers (`auth.client_certificates`)."""
    revoked_serials_file: Path | None = None
    """Serial numbers of revoked client certificates."""


class Queue(Section):
    """Bounds on the requests waiting in a gateway. The keys `tenant_...` are bounds for each single tenant, and have no
    effect if they are absent."""

    max_requests: Annotated[int, Field(ge=1)] = 20_000
    """Waiting requests of all tenants."""
    max_tokens: Annotated[int, Field(ge=1)] = 40_000_000
    """Prompt tokens of all waiting requests."""
    max_wait_s: Annotated[float, Field(gt=0)] = 120.0
    """Longest wait of a request for a worker, in seconds."""
    tenant_max_requests: Annotated[int, Field(ge=1)] | None = None
    """Waiting requests of one tenant; none: no bound."""
    tenant_max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Prompt tokens of one tenant's waiting requests; none: no bound."""


class Resume(Section):
    """Resume of calls whose worker is lost or leaves: they continue on another compatible worker.

    A call fails when `max_attempts` workers have failed (1: when its first worker fails), or when it has waited
    `max_wait_s` for another worker. It also fails when `max_silent_losses` workers in a row were lost before they sent
    a token, since the call may be the cause. With a resume token, a client continues at another gateway; the token is
    valid for `token_expires_s`.
    """

    max_attempts: Annotated[int, Field(ge=1, le=16)] = 5
    """Lost workers after which a call fails; 1: with its first worker."""
    max_silent_losses: Annotated[int, Field(ge=1, le=16)] = 2
    """Workers in a row that may be lost without a token from the call before it fails."""
    max_wait_s: Annotated[float, Field(ge=0)] = 60.0
    """Longest wait of a call for another worker, in seconds."""
    token_expires_s: Annotated[float, Field(ge=1, le=86_400)] = 900.0
    """Seconds for which a resume token is valid."""


class GatewaySettings(Section):
    """Settings of a gateway."""

    listen: Listen = Listen()
    host_names: Annotated[tuple[HostName, ...], Field(max_length=256)] = ()
    """Further host names, without ports, at which a gateway without `auth` answers over HTTP. It refuses names that a
    web page could have, and answers at addresses, `localhost`, names without a dot and names of services anyway."""
    tls: ClientTls | None = None
    link_tls: LinkTls | None = None
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    """Gateway processes on one host. They share `grpc` and `http`; process i > 0 has its link port 8 + i and its
    metrics port 10 + i above the configured ones; only the first has `admin`."""
    keepalive_s: Annotated[float, Field(gt=0)] = 15.0
    """Silence of a stream, in seconds, after which the caller gets a chunk with progress alone."""
    max_connection_age_s: Annotated[float, Field(gt=0)] = 900.0
    """Age of a connection, in seconds, at which its client is asked to connect anew."""
    drain_timeout_s: Annotated[float, Field(ge=0, le=604_800)] = 300.0
    """Seconds that running calls have to end when the gateway, a worker or a replaced version stops."""
    max_message_bytes: Annotated[int, Field(ge=65536, le=1 << 30)] = 16 * 1024 * 1024
    """Largest request message, in bytes."""
    queue: Queue = Queue()
    resume: Resume = Resume()
    console: Console = Console()

    def siblings(self, process: int) -> tuple[str, ...]:
        """Return the link addresses of all processes except `process`. Each address is `:port` without a host, since
        all processes run on this host."""
        others = (self.listen.of(i).link for i in range(self.processes) if i != process)
        return tuple(":" + address.rsplit(":", 1)[1] for address in others)

    def open_port(self) -> str:
        """Return the name of a listener (`grpc`, `http` or `link`) with port 0 although the gateway has several
        processes; "" if there is none. Each process would choose a different port, so the caller refuses this
        listener."""
        if self.processes == 1:
            return ""
        return next((n for n in ("grpc", "http", "link") if getattr(self.listen, n).endswith(":0")), "")

    @model_validator(mode="after")
    def _ports(self) -> GatewaySettings:
        raise_all((*self._ports_too_high(), *self._port_conflicts(), *self._exposed_link()))
        return self

    def _ports_too_high(self) -> Iterator[Problem]:
        """Yield a problem for each port above MAX_PORT. Only the last gateway process is checked, because it has the
        highest ports."""
        last = self.listen.of(self.processes - 1)
        for name in ("link", "metrics"):
            if int(getattr(last, name).rsplit(":", 1)[1]) > MAX_PORT:
                yield Problem(
                    ("processes",),
                    f"{self.processes} with listen.{name} {getattr(self.listen, name)}: the last process would listen "
                    f"on {getattr(last, name)}, above {MAX_PORT}; take a lower port or fewer processes",
                )

    def _port_conflicts(self) -> Iterator[Problem]:
        """Yield a problem for each listener, of any process, that would bind the same port as another listener."""
        addresses = [(name, getattr(self.listen, name)) for name in ("grpc", "http", "link", "admin", "metrics")]
        for process in range(1, self.processes):
            listen = self.listen.of(process)
            addresses += [(f"{name} of process {process}", getattr(listen, name)) for name in ("link", "metrics")]
        for problem in listeners(addresses):
            name, _, of_process = str(problem.path[-1]).partition(" ")
            if of_process:
                yield Problem(("processes",), f"listen.{name} {of_process}: {problem.text}")
            else:
                yield Problem(("listen", name), problem.text)

    def _exposed_link(self) -> Iterator[Problem]:
        link = self.listen.link
        if not is_loopback(link) and self.link_tls is None:
            yield Problem(
                ("listen", "link"),
                f"is {link}, off loopback, and link_tls is not set: "
                "any process that reaches it could pose as a worker. Set gateway.link_tls, or listen on loopback",
            )
