"""A private folder for the sockets of vLLM's processes. By default vLLM creates the sockets in /tmp and never removes
them.

A process removes its folder when the last engine of the process has ended. If the process is killed, the user's next
engine on the host removes the folder. Ranks that Ray places on other hosts do not have the folder and use vLLM's
default folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

ENV = "VLLM_RPC_BASE_PATH"
PREFIX = "headrace-ipc-"
FORKS = "headrace-fork-"
"""Prefix of the folder that has the socket of the fork server (fork_server.py)."""


class SocketFolder:
    """The socket folder of this process, shared by the engines of the process."""

    def __init__(self, base: Path | None = None) -> None:
        self._base = base
        self._own: OwnFolder | None = None
        self._engines = 0

    def acquire(self) -> bool:
        """Register an engine as a user of the folder. The first engine creates the folder and sets the
        environment variable for it.

        Returns False, and registers nothing, if that variable already names a folder that is not this process's
        own.
        """
        if os.environ.get(ENV) != (str(self._own.path) if self._own else None):
            return False
        if self._own is None:
            self._own = OwnFolder(PREFIX, self._base)
            os.environ[ENV] = str(self._own.path)
        self._engines += 1
        return True

    def release(self) -> None:
        """Record that an engine no longer uses the folder. Only for an engine for which `acquire` returned True.

        When the last engine has been released, the folder is removed.
        """
        self._engines -= 1
        if self._engines == 0 and self._own is not None:
            os.environ.pop(ENV, None)
            self._own.remove()
            self._own = None


class OwnFolder:
    """A new folder that belongs to this process. It exists until `remove`, or until another process removes it after
    this process has ended (`sweep`).

    A lock on the folder shows that its creator is alive. A pid in the folder's name would not be enough: containers
    that share a folder of temporary files can have different processes with equal pids.
    """

    def __init__(self, prefix: str, base: Path | None = None) -> None:
        base = base or Path(tempfile.gettempdir())
        sweep(base)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
            with contextlib.suppress(FileNotFoundError):
                self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
                with contextlib.suppress(OSError):  # a folder that cannot be locked (NFS) is never swept
                    fcntl.flock(self._lock, fcntl.LOCK_EX)
                if self.path.exists():  # otherwise another process swept the folder before it was locked
                    return
                os.close(self._lock)

    def remove(self) -> None:
        """Remove the folder and its contents."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def sweep(base: Path | None = None) -> int:
    """Remove the folders that this user's killed processes have left behind; return the number of removed folders.

    `base`: the folder for temporary files.
    """
    base = base or Path(tempfile.gettempdir())
    return sum(map(_sweep_folder, (*base.glob(f"{PREFIX}*"), *base.glob(f"{FORKS}*"))))


def _sweep_folder(path: Path) -> bool:
    with contextlib.suppress(OSError):  # locked by a live process, not a folder, or another user's folder
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if os.fstat(lock).st_uid == os.getuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
                return True
        finally:
            os.close(lock)
    return False


def folder() -> Path | None:
    """Return the socket folder of the engine that this process owns or belongs to; None if this host has no such
    folder."""
    named = Path(os.environ.get(ENV, ""))
    return named if named.name.startswith(PREFIX) and named.is_dir() else None


def restore_default_elsewhere() -> None:
    """Use vLLM's default folder for sockets if the folder that the environment names does not exist on this host.

    This happens in a rank on another host: the rank gets a copy of the environment of the engine's process. Each vLLM
    process calls this function (watchdog.watch).
    """
    if Path(os.environ.get(ENV, "")).name.startswith(PREFIX) and folder() is None:
        del os.environ[ENV]


OURS = SocketFolder()
