"""TLS of the listening ports. Certificates are reread when their files change.

A listener gets a NewestContext, which starts each connection with a context made from the current files. While a
renewal is half written, certificate and key do not match; the last valid context then stays in force.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any, Self

import structlog

from cluster.config.gateway import ClientTls, LinkTls, Tls
from cluster.gateway.auth.revocation import CheckedContext, RevokedFile

log = structlog.get_logger("tls")

HANDSHAKE_S = 20.0
Stamp = tuple[tuple[int, int, int], ...]


class NewestContext(ssl.SSLContext):
    """An SSL context for a listener. Each connection uses the newest certificate files, because asyncio calls
    `wrap_bio` for each connection."""

    _files: tuple[Path, ...]
    _tls: ClientTls
    _protocols: list[str]
    _setting: str
    _client: ssl.VerifyMode
    _stamp: Stamp
    _revoked: RevokedFile | None
    _now: ssl.SSLContext

    @classmethod
    def of(cls, tls: ClientTls, *protocols: str) -> Self:
        """Return the TLS context for a client port. `protocols`: ALPN names. Raises ValueError with a message that
        names the setting."""
        # A client certificate is optional, since a caller with an API key needs no certificate.
        return cls._of(tls, "gateway.tls", ssl.CERT_OPTIONAL, *protocols)

    @classmethod
    def of_link(cls, tls: Tls) -> Self:
        """Return the context for the link port, which requires certificates from both sides. Raises ValueError with a
        message that names the setting."""
        revoked = tls.revoked_serials_file if isinstance(tls, LinkTls) else None
        files = ClientTls(
            cert_file=tls.cert_file, key_file=tls.key_file, client_ca_file=tls.ca_file, revoked_serials_file=revoked
        )
        return cls._of(files, "gateway.link_tls", ssl.CERT_REQUIRED, "h2")

    @classmethod
    def _of(cls, tls: ClientTls, setting: str, client: ssl.VerifyMode, *protocols: str) -> Self:
        context = cls(ssl.PROTOCOL_TLS_SERVER)
        context._setting = setting
        context._client = client
        context._tls = tls
        context._files = tuple(path for path in (tls.cert_file, tls.key_file, tls.client_ca_file) if path is not None)
        context._protocols = list(protocols)
        context._revoked = revoked_file(tls, setting)
        context._stamp = context._file_stamp()
        context._now = context._read()
        return context

    def wrap_bio(self, *arguments: Any, **named: Any) -> ssl.SSLObject:
        """Start a connection with a context made from the newest files."""
        self._refresh()
        return self._now.wrap_bio(*arguments, **named)

    def _refresh(self) -> None:
        stamp = self._file_stamp()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._now = self._read()
            log.info("certificate.reloaded", file=str(self._tls.cert_file))
        except ValueError as error:
            log.warning("certificate.not_reloaded", error=str(error))

    def _file_stamp(self) -> Stamp:
        try:
            statuses = [path.stat() for path in self._files]
        except OSError:
            return ()
        return tuple((status.st_ino, status.st_mtime_ns, status.st_size) for status in statuses)

    def _read(self) -> ssl.SSLContext:
        tls = self._tls
        context = CheckedContext(ssl.PROTOCOL_TLS_SERVER)
        context.revoked = self._revoked
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(self._protocols)
        try:
            context.load_cert_chain(tls.cert_file, tls.key_file)
        except OSError as error:  # includes ssl.SSLError
            raise ValueError(f"{self._setting}: {tls.cert_file} or {tls.key_file} cannot be used: {error}") from None
        if tls.client_ca_file is not None:
            context.verify_mode = self._client
            try:
                context.load_verify_locations(tls.client_ca_file)
            except OSError as error:
                what = f"{self._setting}: the authorities of {tls.client_ca_file}"
                raise ValueError(f"{what} cannot be used: {error}") from None
        return context


def revoked_file(tls: ClientTls | LinkTls | None, setting: str) -> RevokedFile | None:
    """Return the revocation list that a TLS section configures; None if the section has no list. Raises ValueError with
    a message that names the setting."""
    path = None if tls is None else tls.revoked_serials_file
    return None if path is None else RevokedFile(path, f"{setting}.revoked_serials_file")


def first_dns_name(certificate: bytes) -> str:
    """Return the first DNS name in a PEM certificate; "" if the certificate has no DNS name.

    A client that has the certificate file of a server can verify the server by this name."""
    from cryptography import x509

    try:
        loaded = x509.load_pem_x509_certificate(certificate)
        names = loaded.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (ValueError, x509.ExtensionNotFound):
        return ""
    return next(iter(names.value.get_values_for_type(x509.DNSName)), "")
