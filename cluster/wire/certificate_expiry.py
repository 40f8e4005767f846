"""Expiry of the certificates that this process uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self


class ServerFiles(Protocol):
    """The TLS files of the gateway's client ports: a part of config.gateway.ClientTls."""

    @property
    def cert_file(self) -> Path:
        """Certificate chain of this gateway."""

    @property
    def client_ca_file(self) -> Path | None:
        """CA certificates that verify the callers' certificates."""


class LinkFiles(Protocol):
    """The certificate files of one side of a link. config.gateway.Tls implements it."""

    @property
    def cert_file(self) -> Path:
        """Certificate chain of this process."""

    @property
    def ca_file(self) -> Path:
        """Path of the file with the CA certificates. They verify the certificate of the process at the other end of a
        link."""


@dataclass(frozen=True, slots=True)
class CertificateExpiry:
    """The times at which the certificates in a set of files expire. A file is read again when it changes.

    A certificate chain expires when the first of its certificates expires. A file of CA certificates expires when the
    last of them expires, because a rotation keeps the old CA certificate in the file for a while.
    """

    chains: Sequence[Path] = ()
    authorities: Sequence[Path] = ()
    _known: dict[tuple[Path, bool], tuple[int, float | None]] = field(default_factory=dict)

    @classmethod
    def of_gateway(cls, clients: ServerFiles | None, link: LinkFiles | None) -> Self:
        """Return the expiry of a gateway's files. `clients`: files of the client ports. `link`: files of the link
        port."""
        chains = [tls.cert_file for tls in (clients, link) if tls is not None]
        authorities = [link.ca_file] if link is not None else []
        if clients is not None and clients.client_ca_file is not None:
            authorities.append(clients.client_ca_file)
        return cls(chains, authorities)

    @classmethod
    def of_link(cls, link: LinkFiles | None) -> Self:
        """Return the expiry of the certificate files that a process uses to connect to the gateways."""
        return cls() if link is None else cls([link.cert_file], [link.ca_file])

    def current(self) -> Iterator[tuple[Path, float]]:
        """Yield each readable certificate file with the time at which it expires, in seconds since the epoch."""
        for files, is_authority in ((self.chains, False), (self.authorities, True)):
            for file in files:
                if (expires_at_s := self._expiry(file, is_authority=is_authority)) is not None:
                    yield file, expires_at_s

    def _expiry(self, file: Path, *, is_authority: bool) -> float | None:
        key = file, is_authority
        try:
            stamp = file.stat().st_mtime_ns
            if key not in self._known or self._known[key][0] != stamp:
                self._known[key] = stamp, _expiry_in(file.read_bytes(), is_authority=is_authority)
        except OSError:
            return None
        return self._known[key][1]


def _expiry_in(content: bytes, *, is_authority: bool) -> float | None:
    """Return when the certificates in a PEM file expire; None if the file has no certificate. `is_authority`: whether
    they are CA certificates. If so, the latest expiry is returned, otherwise the earliest."""
    from cryptography import x509

    try:
        ends = [one.not_valid_after_utc.timestamp() for one in x509.load_pem_x509_certificates(content)]
    except ValueError:
        return None
    return max(ends) if is_authority else min(ends)
