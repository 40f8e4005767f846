"""A folder of this process's own for the sockets of vLLM's processes, which vLLM makes in /tmp and never removes.

The folder goes with the last engine of the process. One that a killed process left is removed by the next engine of
the same user on the host. Ranks that Ray places on other hosts, where the folder is not, keep vLLM's default.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import psutil

ENV = "VLLM_RPC_BASE_PATH"
PREFIX = "headrace-ipc-"
FORKS = "headrace-fork-"
"""Of the folder in which multiprocessing has the socket of the server that engines fork from (forks.py)."""


class SocketFolder:
    """The folder of this process, shared by its engines."""

    def __init__(self, base: Path | None = None) -> None:
        self._base = base or Path(tempfile.gettempdir())
        self._engines = 0

    def acquire(self) -> bool:
        """One more engine uses it; False when the environment names another place."""
        mine = self._base / f"{PREFIX}{os.getpid()}"
        if os.environ.get(ENV, str(mine)) != str(mine):
            return False
        sweep(self._base)
        mine.mkdir(mode=0o700, exist_ok=True)
        os.environ[ENV] = str(mine)
        self._engines += 1
        return True

    def release(self) -> None:
        """An engine that `acquire` answered True to has ended."""
        self._engines -= 1
        if self._engines == 0:
            shutil.rmtree(os.environ.pop(ENV), ignore_errors=True)


def sweep(base: Path | None = None) -> int:
    """Remove what killed processes of this user left; how many folders. `base`: where temporary files are."""
    base = base or Path(tempfile.gettempdir())
    removed = 0
    for folder in (*base.glob(f"{PREFIX}*"), *base.glob(f"{FORKS}*")):
        pid = folder.name.rpartition("-")[2]
        with contextlib.suppress(OSError):
            if pid.isdigit() and folder.stat().st_uid == os.getuid() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(folder, ignore_errors=True)
                removed += 1
    return removed


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
