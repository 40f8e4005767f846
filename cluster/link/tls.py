"""Certificate files of one side of a link, and the gRPC credentials made of them. Mutual: both sides must show one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files: this side's certificate chain and key, and the authorities that the other side's must come from."""

    cert_file: Path
    key_file: Path
    ca_file: Path

    def _read(self) -> tuple[bytes, bytes, bytes]:
        parts = []
        for what, path in (("cert_file", self.cert_file), ("key_file", self.key_file), ("ca_file", self.ca_file)):
            try:
                parts.append(path.read_bytes())
            except OSError as error:
                raise ValueError(f"link TLS: {what} {path} cannot be read: {error.strerror}") from None
        return parts[0], parts[1], parts[2]

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Credentials of one who dials."""
        cert, key, authority = self._read()
        return grpc.ssl_channel_credentials(root_certificates=authority, private_key=key, certificate_chain=cert)
