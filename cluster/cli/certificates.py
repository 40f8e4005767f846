"""Create keys and certificates as files: a certificate authority, and certificates that the authority issues."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cluster.policy.tenants.revocation_list import Revocation

ISSUED = "issued"
"""Name of the list of issued certificates, a file in the authority's folder with the format of a revocation list."""
CLOCK_SKEW = datetime.timedelta(minutes=5)
"""A new certificate is valid from CLOCK_SKEW before its issue, because the clocks of other machines may be behind."""


def make_authority(cert_file: Path, key_file: Path, days: int, subject: str = "headrace link authority") -> None:
    """Create a certificate authority: a key, and a self-signed certificate for the key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(subject)
    builder = (
        _new_builder(name, key, days)
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    )
    _write(key_file, _private_pem(key))
    _write(cert_file, _public_pem(builder.sign(key, hashes.SHA256())), 0o644)


def issue_server(folder: Path, name: str, hosts: Sequence[str], days: int) -> tuple[Path, Path]:
    """Issue a server certificate for host names and IP addresses. Returns the certificate file and the key file.

    Raises ValueError if the folder has no authority.
    """
    return _issue(folder, name, [_host_name(host) for host in hosts], ExtendedKeyUsageOID.SERVER_AUTH, days)


def issue_client(folder: Path, name: str, uris: Sequence[str], days: int) -> tuple[Path, Path]:
    """Issue a client certificate. Returns the certificate file and the key file.

    `uris`: URIs of the roles that the certificate grants. Raises ValueError if the folder has no authority.
    """
    names = [x509.UniformResourceIdentifier(uri) for uri in uris]
    return _issue(folder, name, names, ExtendedKeyUsageOID.CLIENT_AUTH, days)


def _issue(
    folder: Path, name: str, names: Sequence[x509.GeneralName], usage: x509.ObjectIdentifier, days: int
) -> tuple[Path, Path]:
    authority, authority_key = _authority(folder)
    last = authority.not_valid_after_utc
    if last < datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days - 1):
        raise ValueError(
            f"{folder}: the authority expires on {last:%Y-%m-%d}, before a certificate valid for {days} days: "
            "ask for fewer --days, or make a new authority"
        )
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        _new_builder(_name(name), key, days)
        .issuer_name(authority.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )
    cert_file, key_file = folder / f"{name}.crt", folder / f"{name}.key"
    certificate = builder.sign(authority_key, hashes.SHA256())
    _write(key_file, _private_pem(key))
    _write(cert_file, _public_pem(certificate), 0o644)
    with (folder / ISSUED).open("a") as issued:
        issued.write(f"{revocation_of(certificate, name).line()}\n")
    return cert_file, key_file


def revocation_of(certificate: x509.Certificate, note: str = "") -> Revocation:
    """Return the entry of a revocation list that revokes a certificate."""
    full_note = f"{note}, valid until {certificate.not_valid_after_utc:%Y-%m-%d}".removeprefix(", ")
    return Revocation(certificate.serial_number, certificate.issuer.rfc4514_string(), full_note)


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Load the certificate and the key of a folder's authority. Raises ValueError if the folder has no authority."""
    try:
        certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
        certificate.verify_directly_issued_by(certificate)
    except (OSError, ValueError, TypeError, InvalidSignature) as error:
        raise ValueError(
            f"{folder}: no certificate authority here ({error}); make one: `headrace certs ca {folder}`"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ValueError(f"{folder}: ca.key is not the key of ca.crt")
    return certificate, key


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _new_builder(subject: x509.Name, key: ec.EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _host_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _public_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _write(file: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a file atomically. The new file is created with its final mode, so other users can never read a key."""
    draft = file.with_name(f"{file.name}.new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
        stream.write(data)
    draft.replace(file)
