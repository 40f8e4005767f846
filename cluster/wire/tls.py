"""The certificate files of one side of a link, and gRPC credentials made from the files. TLS is mutual."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The PEM files of one side of a link: this side's certificate chain and key, and the CA certificates that verify
    the other side."""

    cert_file: Path
    key_file: Path
    ca_file: Path

    def _read(self) -> tuple[bytes, bytes, bytes]:
        parts = []
        for setting, path in (("cert_file", self.cert_file), ("key_file", self.key_file), ("ca_file", self.ca_file)):
            try:
                parts.append(path.read_bytes())
            except OSError as error:
                raise ValueError(f"link TLS: {setting} {path} cannot be read: {error.strerror}") from None
        return parts[0], parts[1], parts[2]

    def context(self) -> ssl.SSLContext:
        """Create an SSL context for asyncio connections. Raises ValueError for unreadable or invalid files."""
        authority = self._read()[2]
        try:
            context = ssl.create_default_context(cadata=authority.decode("ascii", "replace"))
            context.load_cert_chain(self.cert_file, self.key_file)
        except (OSError, ValueError) as error:  # including ssl.SSLError; the files may be half renewed
            raise ValueError(f"link TLS: {error}") from None
        context.set_alpn_protocols(["h2"])
        return context

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Create gRPC credentials for the dialing side. Raises ValueError if a file cannot be read."""
        cert, key, authority = self._read()
        return grpc.ssl_channel_credentials(root_certificates=authority, private_key=key, certificate_chain=cert)
