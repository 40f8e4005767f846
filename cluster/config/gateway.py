"""The gateway's section of cluster.yaml: where it listens, under which certificates, and what may wait in it."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from cluster.config.checks import listeners
from cluster.config.problems import Problem, raise_all


def is_loopback(address: str) -> bool:
    """Whether `host:port` is reachable from this host only."""
    host = address.rsplit(":", 1)[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Section(BaseModel):
    """A part of the configuration: frozen, and an unknown key is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)


MAX_PORT = 65_535


def check_address(value: str, least: int = 0) -> str:
    """`host:port` itself. Raises ValueError for a port or an IP address that cannot be."""
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


Address = Annotated[str, Field(pattern=r"^(\[[0-9a-fA-F:]+\]|[^:\s]+):[0-9]{1,5}$"), AfterValidator(check_address)]
# Of process i > 0: with the ports of Listen's defaults, 50060+i and 9410+i.
LINK_ABOVE, METRICS_ABOVE = 8, 10


def _above(address: str, by: int) -> str:
    """The address that many ports higher; port 0 stays."""
    host, port = address.rsplit(":", 1)
    return f"{host}:{int(port) + by if int(port) else 0}"


class Listen(Section):
    """Where a gateway listens, each `host:port`; port 0 picks a free one."""

    grpc: Address = "127.0.0.1:50051"
    http: Address = "127.0.0.1:8000"
    link: Address = "127.0.0.1:50052"
    admin: Address = "127.0.0.1:50053"
    metrics: Address = "127.0.0.1:9400"

    def of(self, process: int) -> Listen:
        """Those of one process: `grpc` and `http` are shared, `link` and `metrics` its own, `admin` is process 0's."""
        if not process:
            return self
        own = {
            "link": _above(self.link, LINK_ABOVE + process),
            "metrics": _above(self.metrics, METRICS_ABOVE + process),
        }
        return self.model_copy(update=own)


class Tls(Section):
    """Certificate files of one side of a mutual TLS connection."""

    cert_file: Path
    key_file: Path
    ca_file: Path


class LinkTls(Tls):
    """The link port's. `revoked_serials_file`: certificates that are refused all the same, re-read when it changes."""

    revoked_serials_file: Path | None = None


class ClientTls(Section):
    """The certificate of client and admin ports, read again when the files change.

    `client_ca_file`: whose certificates may be shown in place of a key (auth.client_certificates).
    `revoked_serials_file`: which of these are refused all the same."""

    cert_file: Path
    key_file: Path
    client_ca_file: Path | None = None
    revoked_serials_file: Path | None = None


class Queue(Section):
    """Bounds on what waits in a gateway, in all and (`tenant_...`; none when absent) of each tenant."""

    max_requests: Annotated[int, Field(ge=1)] = 20_000
    max_tokens: Annotated[int, Field(ge=1)] = 40_000_000
    max_wait_s: Annotated[float, Field(gt=0)] = 120.0
    tenant_max_requests: Annotated[int, Field(ge=1)] | None = None
    tenant_max_tokens: Annotated[int, Field(ge=1)] | None = None


class Resume(Section):
    """What becomes of calls whose worker is lost or leaves: they go on at another like it.

    `max_attempts` workers may fail a call before it fails; it waits `max_wait_s` for another worker. With
    `max_attempts: 1` it fails with its worker. It also fails when `max_silent_losses` workers were lost in a row with
    it and no token came between, since it may be what ends them. With a resume token a client goes on at another
    gateway; it opens for `token_expires_s`."""

    max_attempts: Annotated[int, Field(ge=1, le=16)] = 5
    max_silent_losses: Annotated[int, Field(ge=1, le=16)] = 2
    max_wait_s: Annotated[float, Field(ge=0)] = 60.0
    token_expires_s: Annotated[float, Field(ge=1, le=86_400)] = 900.0


class GatewaySettings(Section):
    """The door."""

    listen: Listen = Listen()
    tls: ClientTls | None = None
    link_tls: LinkTls | None = None
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    keepalive_s: Annotated[float, Field(gt=0)] = 15.0
    max_connection_age_s: Annotated[float, Field(gt=0)] = 900.0
    drain_timeout_s: Annotated[float, Field(ge=0, le=604_800)] = 300.0
    max_message_bytes: Annotated[int, Field(ge=65536, le=1 << 30)] = 16 * 1024 * 1024
    queue: Queue = Queue()
    resume: Resume = Resume()

    def siblings(self, process: int) -> tuple[str, ...]:
        """Link addresses of the other processes, each `:port` on the host on which this one is dialled."""
        others = (self.listen.of(i).link for i in range(self.processes) if i != process)
        return tuple(":" + address.rsplit(":", 1)[1] for address in others)

    def open_port(self) -> str:
        """The first listener whose port must be known before processes can share it or name it, and is 0; or ""."""
        if self.processes == 1:
            return ""
        return next((n for n in ("grpc", "http", "link") if getattr(self.listen, n).endswith(":0")), "")

    @model_validator(mode="after")
    def _ports(self) -> GatewaySettings:
        raise_all((*self._above(), *self._twice(), *self._open_link()))
        return self

    def _above(self) -> Iterator[Problem]:
        """Ports of the last process that do not exist."""
        last = self.listen.of(self.processes - 1)
        for name in ("link", "metrics"):
            if int(getattr(last, name).rsplit(":", 1)[1]) > MAX_PORT:
                yield Problem(
                    ("processes",),
                    f"{self.processes} with listen.{name} {getattr(self.listen, name)}: the last process would listen "
                    f"on {getattr(last, name)}, above {MAX_PORT}; take a lower port or fewer processes",
                )

    def _twice(self) -> Iterator[Problem]:
        """Listeners of all processes that would bind one port."""
        own = [(name, getattr(self.listen, name)) for name in ("grpc", "http", "link", "admin", "metrics")]
        for process in range(1, self.processes):
            theirs = self.listen.of(process)
            own += [(f"{name} of process {process}", getattr(theirs, name)) for name in ("link", "metrics")]
        for problem in listeners(own):
            name, _, process_too = str(problem.path[-1]).partition(" ")
            if process_too:
                yield Problem(("processes",), f"listen.{name} {process_too}: {problem.text}")
            else:
                yield Problem(("listen", name), problem.text)

    def _open_link(self) -> Iterator[Problem]:
        link = self.listen.link
        if not is_loopback(link) and self.link_tls is None:
            yield Problem(
                ("listen", "link"),
                f"is {link}, off loopback, and link_tls is not set: "
                "whoever reaches it could pose as a worker. Set gateway.link_tls, or listen on loopback",
            )
