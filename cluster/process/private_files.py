"""Files and folders that only their owner enters or reads, whatever the umask of the process.

State folders hold secrets, names of tenants, the audit and hashes of keys. What an earlier release or another program
made wider is narrowed when it is opened next, if it belongs to this user.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

OTHERS = 0o077
"""Permissions of a file's group and of everyone else."""


def make_private_folder(folder: Path) -> None:
    """Make a state folder and those above it that are missing; narrow one that exists. Raises OSError."""
    make_missing_folders(folder)
    narrow(folder)


def make_missing_folders(folder: Path) -> None:
    """Make a folder and those above it that are missing; one that exists may be anybody's and stays as it is. Raises
    OSError."""
    missing = []
    at = folder
    while not at.exists():
        missing.append(at)
        at = at.parent
    for one in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process was faster
            one.mkdir(mode=0o700)
            one.chmod(0o700)  # a umask may have taken the owner's permissions too


def narrow(path: Path) -> None:
    """Take the permissions of others from a file or folder of this user. Nothing happens to one that is missing or
    somebody else's, nor to a folder that is shared on purpose, as /tmp is (the sticky bit)."""
    try:
        found = path.stat()
    except OSError:
        return
    if found.st_uid == os.geteuid() and found.st_mode & OTHERS and not found.st_mode & stat.S_ISVTX:
        with contextlib.suppress(OSError):  # a file system without permissions
            path.chmod(stat.S_IMODE(found.st_mode) & ~OTHERS)


def make_private_database(file: Path) -> None:
    """Make an SQLite file, empty, before SQLite does, and narrow one that exists with what SQLite keeps beside it.
    SQLite gives the files that it makes beside a database the database's permissions."""
    with contextlib.suppress(OSError):  # SQLite says it in words: no folder, no permission, a read-only disk
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(handle, 0o600)
        finally:
            os.close(handle)
    for suffix in ("", "-wal", "-shm", "-journal"):
        narrow(file.with_name(file.name + suffix))
