"""Files and folders that only their owner can read, whatever the umask of the process.

State folders hold secrets, tenant names, the audit log and key hashes. An earlier release or another program may have
set wider permissions. The permissions are narrowed when this process next opens the file, if the process's user owns
it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

OTHERS = 0o077
"""Permission bits of a file's group and of all other users."""


def make_private_folder(folder: Path) -> None:
    """Create a state folder and its missing parents, or narrow the permissions of an existing folder. Raises
    OSError."""
    make_missing_folders(folder)
    narrow(folder)


def make_missing_folders(folder: Path) -> None:
    """Create a folder and its missing parents. An existing folder is not changed. Raises OSError."""
    missing = []
    at = folder
    while not at.exists():
        missing.append(at)
        at = at.parent
    for missing_folder in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another process has created the folder
            missing_folder.mkdir(mode=0o700)
            missing_folder.chmod(0o700)  # a umask may have removed the owner's permissions too


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file that only its owner can read. Readers see either the old or the new content, even after a crash of
    this process. Raises OSError."""
    draft = path.with_suffix(".new")
    draft.unlink(missing_ok=True)  # left by a crashed process, perhaps with wider permissions
    handle = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    with open(handle, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
    draft.replace(path)


def narrow(path: Path) -> None:
    """Remove the permissions of group and others from a file or folder of this user. Skips a missing path, a path of
    another user, and a folder that is shared on purpose, like /tmp (sticky bit)."""
    try:
        status = path.stat()
    except OSError:
        return
    if status.st_uid == os.geteuid() and status.st_mode & OTHERS and not status.st_mode & stat.S_ISVTX:
        with contextlib.suppress(OSError):  # a file system without permissions
            path.chmod(stat.S_IMODE(status.st_mode) & ~OTHERS)


def make_private_database(file: Path) -> None:
    """Make a SQLite database private: create an empty file before SQLite does, or narrow the permissions of an existing
    file and its side files. SQLite gives new side files the permissions of the database file."""
    with contextlib.suppress(OSError):  # SQLite reports the error better: no folder, no permission, a read-only disk
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(handle, 0o600)
        finally:
            os.close(handle)
    for suffix in ("", "-wal", "-shm", "-journal"):
        narrow(file.with_name(file.name + suffix))
