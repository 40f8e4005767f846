"""Functions that replace a file atomically, and functions that read and create files of secrets."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

from cluster.process.private_files import make_missing_folders

MIN_SECRET_CHARACTERS = 32


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file atomically. The new file is readable and writable by its owner only. Raises OSError."""
    make_missing_folders(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.rename(name, path)
    except BaseException:  # also on KeyboardInterrupt: remove the temporary file
        os.unlink(name)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that the names of the files in the folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_secrets(path: Path, setting: str) -> tuple[bytes, ...]:
    """Read secrets from a file with one secret per line and comment lines that begin with `#`.

    The first secret is for new keys, signatures and sealed data. The other secrets are older and still accepted. Raises
    ValueError. The error message names the setting and the remedy, and never contains a secret.
    """
    remedy = "write one secret of 32 or more random characters per line: `openssl rand -hex 32`"
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{setting}: {path} cannot be read: {error}; {remedy}") from None
    values = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not values:
        raise ValueError(f"{setting}: {path} holds no secret; {remedy}")
    for number, secret in enumerate(values, start=1):
        if len(secret) < MIN_SECRET_CHARACTERS:
            raise ValueError(
                f"{setting}: secret {number} of {path} is shorter than {MIN_SECRET_CHARACTERS} characters; {remedy}"
            )
    if len(set(values)) != len(values):
        raise ValueError(f"{setting}: {path} holds the same secret twice; remove one")
    return tuple(secret.encode() for secret in values)


def make_secret(path: Path) -> None:
    """Create a file with one new secret, for a local cluster. Raises OSError.

    An existing file stays unchanged, even if another process creates it at the same time.
    """
    make_missing_folders(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w") as out:
            out.write(secrets.token_hex(32) + "\n")
            out.flush()
            os.fsync(out.fileno())
        try:
            os.link(name, path)
        except FileExistsError:
            return
    finally:
        os.unlink(name)
    sync_folder(path.parent)
