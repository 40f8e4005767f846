"""Revoked certificates at the gateway's ports: refused when a handshake ends, and cut where a connection has one.

A list is read again when its file changes, as certificates are. One that is gone or wrong meanwhile leaves the last
good one in force: what is revoked stays so.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import structlog

from cluster.policy.tenants.revocation_list import Revoked

log = structlog.get_logger("tls")

LOOK_S = 0.5
"""So often the lists are looked at for connections that are open."""


class RevokedFile:
    """A list of revoked certificates in a file."""

    def __init__(self, path: Path, setting: str) -> None:
        """Raises ValueError that names the setting."""
        self._path = path
        self._setting = setting
        self._stamp = self._look()
        self._last = self._read()

    def current(self) -> Revoked:
        """The list as the file has it now; the same object for as long as it does not change."""
        stamp = self._look()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._last = self._read()
                log.info("revoked_read", file=str(self._path), certificates=len(self._last.entries))
            except ValueError as error:
                log.warning("revoked_not_read", error=str(error))
        return self._last

    def _look(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat()
        except OSError:
            return (0, 0, 0)
        return (found.st_ino, found.st_mtime_ns, found.st_size)

    def _read(self) -> Revoked:
        try:
            return Revoked.parse(self._path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self._setting}: {self._path} cannot be used: {error}; it holds one serial number a line, or nothing "
                "(`headrace certs revoke` adds to it)"
            ) from None


class CheckedContext(ssl.SSLContext):
    """A context whose connections are refused when the other side's certificate is revoked."""

    revoked: RevokedFile | None = None


class CheckedObject(ssl.SSLObject):
    """The TLS state of one connection."""

    def do_handshake(self) -> None:
        """As any other; at its end the other side's certificate is looked up. Raises ssl.SSLError."""
        super().do_handshake()
        if is_revoked(self):
            log.warning("revoked_refused", certificate=_described(self))
            raise ssl.SSLCertVerificationError(1, "the certificate is revoked")


CheckedContext.sslobject_class = CheckedObject


def is_revoked(tls: ssl.SSLObject) -> bool:
    """Whether the certificate that the other side has shown is revoked now."""
    file = getattr(tls.context, "revoked", None)
    revoked = file.current() if isinstance(file, RevokedFile) else None
    if not revoked:
        return False
    shown = tls.getpeercert(binary_form=True)
    return shown is not None and revoked.has(*_identity(shown))


def _identity(certificate: bytes) -> tuple[int, str]:
    from cryptography import x509

    found = x509.load_der_x509_certificate(certificate)
    return found.serial_number, found.issuer.rfc4514_string()


def _described(tls: ssl.SSLObject) -> str:
    serial, issuer = _identity(tls.getpeercert(binary_form=True) or b"")
    return f"{serial:X} of {issuer}"


class RevocablePort(Protocol):
    """A server whose connections can be cut."""

    def abort_where(self, condition: Callable[[asyncio.BaseTransport], bool]) -> int:
        """Cut the connections for which it holds; returns how many."""


async def cut_revoked(files: Sequence[RevokedFile], ports: Callable[[], Sequence[RevocablePort]]) -> None:
    """Cut connections of certificates that a list names from some moment on, until cancelled."""
    seen = [file.current() for file in files]
    while True:
        await asyncio.sleep(LOOK_S)
        now = [file.current() for file in files]
        if all(one is other for one, other in zip(seen, now, strict=True)):
            continue
        seen = now
        if cut := sum(port.abort_where(_shows_revoked) for port in ports()):
            log.warning("revoked_cut", connections=cut)


def _shows_revoked(transport: asyncio.BaseTransport) -> bool:
    tls = transport.get_extra_info("ssl_object")
    return isinstance(tls, ssl.SSLObject) and is_revoked(tls)
