"""Whether the file that a gateway was started from is right, now and not only at the start.

A file that has become wrong takes nothing down until a process restarts. It is therefore looked at again when it
changes, so that it is seen while everything still serves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import structlog

from cluster.config.schema import ConfigError, load

log = structlog.get_logger("gateway")

LOOK_S = 15.0
MOST_SHOWN = 10


class ConfigState:
    """The state of one file. `watch` runs beside the gateway."""

    def __init__(self, path: Path | None = None, problems: Sequence[str] = (), look_s: float = LOOK_S) -> None:
        """`problems`: what was wrong at the start. Without a path nothing is watched."""
        self._path = path
        self._look_s = look_s
        self._stamp = self._read_stamp()
        self.problems = tuple(problems)
        if problems:
            log.error("config_partly_refused", problems=self.problems[:MOST_SHOWN], serves="the last good catalog")

    @property
    def valid(self) -> bool:
        """Whether a gateway that starts now would read all of it."""
        return not self.problems

    async def watch(self) -> None:
        """Look at the file whenever it has changed, until cancelled."""
        while self._path is not None:
            await asyncio.sleep(self._look_s)
            stamp = self._read_stamp()
            if stamp != self._stamp:
                self._stamp = stamp
                self._tell(await asyncio.to_thread(_problems, self._path))

    def _tell(self, problems: tuple[str, ...]) -> None:
        if problems:
            log.error("config_refused", problems=problems[:MOST_SHOWN], next="the next restart meets it: mend the file")
        elif self.problems:
            log.info("config_right")
        self.problems = problems

    def _read_stamp(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat() if self._path is not None else None
        except OSError:
            found = None
        return (found.st_ino, found.st_mtime_ns, found.st_size) if found is not None else (0, 0, 0)


def _problems(path: Path) -> tuple[str, ...]:
    try:
        load(path)
    except ConfigError as error:
        return tuple(str(error).splitlines())
    return ()
