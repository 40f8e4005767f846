"""Certificate revocation at the gateway's ports. Handshakes with a revoked certificate fail, and open connections with
such a certificate are closed.

A revocation list is reread when its file changes, as certificates are. While the file is missing or invalid, the last
valid list stays in force, so a revoked certificate stays revoked.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import structlog

from cluster.policy.tenants.revocation_list import RevocationList

log = structlog.get_logger("tls")

LOOK_S = 0.5
"""Interval in seconds at which changed lists are applied to open connections."""


class RevokedFile:
    """A file that lists revoked certificates."""

    def __init__(self, path: Path, setting: str) -> None:
        """Read the list from the file. Raises ValueError with a message that names the setting."""
        self._path = path
        self._setting = setting
        self._stamp = self._file_stamp()
        self._last = self._read()

    def current(self) -> RevocationList:
        """Return the newest valid list that the file has held. The same object is returned until the file changes."""
        stamp = self._file_stamp()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._last = self._read()
                log.info("revocation.list_read", file=str(self._path), certificates=len(self._last.entries))
            except ValueError as error:
                log.warning("revocation.list_not_read", error=str(error))
        return self._last

    def _file_stamp(self) -> tuple[int, int, int]:
        try:
            status = self._path.stat()
        except OSError:
            return (0, 0, 0)
        return (status.st_ino, status.st_mtime_ns, status.st_size)

    def _read(self) -> RevocationList:
        try:
            return RevocationList.parse(self._path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self._setting}: {self._path} cannot be used: {error}; it holds one serial number a line, or nothing "
                "(`headrace certs revoke` adds to it)"
            ) from None


class CheckedContext(ssl.SSLContext):
    """A TLS context that refuses a connection if the peer's certificate is revoked."""

    revoked: RevokedFile | None = None


class CheckedObject(ssl.SSLObject):
    """TLS state of one connection, which checks the peer's certificate for revocation."""

    def do_handshake(self) -> None:
        """Complete the handshake, then check the peer's certificate against the revocation list. Raises ssl.SSLError if
        the handshake fails or the certificate is revoked."""
        super().do_handshake()
        if is_revoked(self):
            log.warning("revocation.certificate_refused", certificate=_described(self))
            raise ssl.SSLCertVerificationError(1, "the certificate is revoked")


CheckedContext.sslobject_class = CheckedObject


def is_revoked(tls: ssl.SSLObject) -> bool:
    """Return whether the peer's certificate is revoked now."""
    file = getattr(tls.context, "revoked", None)
    revoked = file.current() if isinstance(file, RevokedFile) else None
    if not revoked:
        return False
    certificate = tls.getpeercert(binary_form=True)
    return certificate is not None and revoked.has(*_identity(certificate))


def _identity(certificate: bytes) -> tuple[int, str]:
    from cryptography import x509

    parsed = x509.load_der_x509_certificate(certificate)
    return parsed.serial_number, parsed.issuer.rfc4514_string()


def _described(tls: ssl.SSLObject) -> str:
    serial, issuer = _identity(tls.getpeercert(binary_form=True) or b"")
    return f"{serial:X} of {issuer}"


class RevocablePort(Protocol):
    """A server that can close chosen connections, such as those whose client certificate was revoked."""

    def abort_where(self, condition: Callable[[asyncio.BaseTransport], bool]) -> int:
        """Close the connections that satisfy the condition. Returns the number of closed connections."""


async def cut_revoked(files: Sequence[RevokedFile], ports: Callable[[], Sequence[RevocablePort]]) -> None:
    """Close open connections when their certificate becomes revoked. Runs until cancelled."""
    before = [file.current() for file in files]
    while True:
        await asyncio.sleep(LOOK_S)
        now = [file.current() for file in files]
        if all(old is new for old, new in zip(before, now, strict=True)):
            continue
        before = now
        if cut := sum(port.abort_where(_has_revoked_certificate) for port in ports()):
            log.warning("revocation.connections_closed", connections=cut)


def _has_revoked_certificate(transport: asyncio.BaseTransport) -> bool:
    tls = transport.get_extra_info("ssl_object")
    return isinstance(tls, ssl.SSLObject) and is_revoked(tls)
