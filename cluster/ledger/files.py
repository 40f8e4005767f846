"""Files that are there whole or not at all, and secrets read from files."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

from cluster.process.private_files import make_missing_folders

MIN_SECRET_CHARACTERS = 32


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file, readable by its owner only; after a crash it is the old one or the new one. Raises OSError."""
    make_missing_folders(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.rename(name, path)
    except BaseException:  # whatever interrupts, no draft stays beside the file
        os.unlink(name)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_secrets(path: Path, setting: str) -> tuple[bytes, ...]:
    """The secrets of a file, one a line, `#` begins a comment; the first signs, all verify.

    Raises ValueError that names the setting and the remedy, and never a secret.
    """
    remedy = "write one secret of 32 or more random characters a line: `openssl rand -hex 32`"
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{setting}: {path} cannot be read: {error}; {remedy}") from None
    found = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not found:
        raise ValueError(f"{setting}: {path} holds no secret; {remedy}")
    for at, secret in enumerate(found, start=1):
        if len(secret) < MIN_SECRET_CHARACTERS:
            raise ValueError(f"{setting}: secret {at} of {path} is shorter than {MIN_SECRET_CHARACTERS}; {remedy}")
    if len(set(found)) != len(found):
        raise ValueError(f"{setting}: {path} holds one secret twice; remove one")
    return tuple(secret.encode() for secret in found)


def make_secret(path: Path) -> None:
    """Write a new secret file unless there is one; for local mode. Of two that try at once one wins. OSError."""
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
