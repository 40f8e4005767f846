"""The expiry of certificates is read from their files, and read again when the files change."""

from __future__ import annotations

import os
import time
from pathlib import Path

from cluster.cli import certificates
from cluster.wire.certificate_expiry import CertificateExpiry

DAY_S = 86_400.0


def days(expiry: CertificateExpiry) -> list[int]:
    """Return the days until the certificates of each file expire, rounded."""
    return [round((at - time.time()) / DAY_S) for _, at in expiry.current()]


def test_chains_end_first_and_authorities_last(tmp_path: Path) -> None:
    """A certificate chain expires when any of its certificates expires. A file of CA certificates expires when all of
    them have expired. A missing file, or a file without certificates, has no expiry. A renewed file has its new
    expiry."""
    authority, key = tmp_path / "ca.crt", tmp_path / "ca.key"
    certificates.make_authority(authority, key, 100)
    cert, _ = certificates.issue_server(tmp_path, "server", ["localhost"], 10)
    both = tmp_path / "both.crt"
    both.write_bytes(cert.read_bytes() + authority.read_bytes())
    assert days(CertificateExpiry([both], [both])) == [10, 100]
    empty = tmp_path / "empty.crt"
    empty.write_text("no certificate")
    expiry = CertificateExpiry([cert, empty, tmp_path / "absent.crt"])
    assert days(expiry) == [10]
    renewed, _ = certificates.issue_server(tmp_path, "renewed", ["localhost"], 40)
    os.replace(renewed, cert)
    assert days(expiry) == [40]
