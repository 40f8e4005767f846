"""A folder of this process's own for the sockets of vLLM's processes, which vLLM makes in /tmp and never removes.

The folder goes with the last engine of the process. One that a killed process left is removed by the next engine of
the same user on the host. Ranks that Ray places on other hosts, where the folder is not, keep vLLM's default.
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
"""Of the folder in which multiprocessing has the socket of the server that engines fork from (fork_server.py)."""


class SocketFolder:
    """The folder of this process, shared by its engines."""

    def __init__(self, base: Path | None = None) -> None:
        self._base = base
        self._own: OwnFolder | None = None
        self._engines = 0

    def acquire(self) -> bool:
        """One more engine uses it; False when the environment names another place."""
        if os.environ.get(ENV) != (str(self._own.path) if self._own else None):
            return False
        if self._own is None:
            self._own = OwnFolder(PREFIX, self._base)
            os.environ[ENV] = str(self._own.path)
        self._engines += 1
        return True

    def release(self) -> None:
        """An engine that `acquire` answered True to has ended."""
        self._engines -= 1
        if self._engines == 0 and self._own is not None:
            os.environ.pop(ENV, None)
            self._own.remove()
            self._own = None


class OwnFolder:
    """A new folder that is there as long as its process, or until `remove`.

    Its lock says that the process lives: a number would not where containers share a folder of temporary files, each
    with processes of its own by the same numbers.
    """

    def __init__(self, prefix: str, base: Path | None = None) -> None:
        base = base or Path(tempfile.gettempdir())
        sweep(base)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
            with contextlib.suppress(FileNotFoundError):
                self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
                with contextlib.suppress(OSError):  # where a folder takes no lock (NFS) none is ever swept
                    fcntl.flock(self._lock, fcntl.LOCK_EX)
                if self.path.exists():  # or another process found it before it was locked, and swept it
                    return
                os.close(self._lock)

    def remove(self) -> None:
        """Take it away with what is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def sweep(base: Path | None = None) -> int:
    """Remove what killed processes of this user left; how many folders. `base`: where temporary files are."""
    base = base or Path(tempfile.gettempdir())
    return sum(map(_swept, (*base.glob(f"{PREFIX}*"), *base.glob(f"{FORKS}*"))))


def _swept(left: Path) -> bool:
    with contextlib.suppress(OSError):  # a living process holds the lock; it is no folder; it is a stranger's
        lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if os.fstat(lock).st_uid == os.getuid():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
                return True
        finally:
            os.close(lock)
    return False


def folder() -> Path | None:
    """The folder of the engine that this process owns or belongs to, where it is."""
    named = Path(os.environ.get(ENV, ""))
    return named if named.name.startswith(PREFIX) and named.is_dir() else None


def only_where_it_is() -> None:
    """In each of vLLM's processes (watchdog.watch): a rank on another host, to which the environment was carried, keeps
    vLLM's default."""
    if Path(os.environ.get(ENV, "")).name.startswith(PREFIX) and folder() is None:
        del os.environ[ENV]


OURS = SocketFolder()
