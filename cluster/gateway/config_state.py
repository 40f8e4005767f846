"""The validity of a gateway's configuration file, checked again whenever the file changes.

A changed file takes effect when a process restarts. The check at each change reports errors while the running
processes still serve.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import structlog

from cluster.config.document import ConfigError, load

log = structlog.get_logger("gateway")

LOOK_S = 15.0
MAX_SHOWN = 10


class ConfigState:
    """The validity of one configuration file. `watch` runs in the background of the gateway."""

    def __init__(self, path: Path | None = None, problems: Sequence[str] = (), look_s: float = LOOK_S) -> None:
        """Create the state. `path`: the configuration file; if it is None, `watch` does nothing. `problems`: the errors
        that were found in the file when the process started. `look_s`: seconds between two checks for a changed
        file."""
        self._path = path
        self._look_s = look_s
        self._stamp = self._read_stamp()
        self.problems = tuple(problems)
        if problems:
            log.error("config.partly_refused", problems=self.problems[:MAX_SHOWN], serves="the last good catalog")

    @property
    def valid(self) -> bool:
        """Whether the file has no errors. A gateway that starts now would then use all of the file."""
        return not self.problems

    async def watch(self) -> None:
        """Check the file after each change. Runs until cancelled."""
        while self._path is not None:
            await asyncio.sleep(self._look_s)
            stamp = self._read_stamp()
            if stamp != self._stamp:
                self._stamp = stamp
                self._update(await asyncio.to_thread(_problems, self._path))

    def _update(self, problems: tuple[str, ...]) -> None:
        if problems:
            log.error(
                "config.refused", problems=problems[:MAX_SHOWN], remedy="correct the file before the next restart"
            )
        elif self.problems:
            log.info("config.accepted")
        self.problems = problems

    def _read_stamp(self) -> tuple[int, int, int]:
        try:
            status = self._path.stat() if self._path is not None else None
        except OSError:
            status = None
        return (status.st_ino, status.st_mtime_ns, status.st_size) if status is not None else (0, 0, 0)


def _problems(path: Path) -> tuple[str, ...]:
    try:
        load(path)
    except ConfigError as error:
        return tuple(str(error).splitlines())
    return ()
