"""A worker's helper process that is replaced when it ends or hangs. The parser and the renderer are such processes."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import structlog

from cluster.wire.dial import wait_first
from cluster.worker.parsing import wire
from cluster.worker.parsing.connection import ParserConnection
from cluster.worker.parsing.hangs import HangWatch
from cluster.worker.parsing.parser_process import ParserHost

log = structlog.get_logger("parser")

RESTART_S = 1.0
"""Seconds between two starts if a process ends before it has answered anything."""
CHECK_S = 0.25
"""Seconds between two checks whether the process hangs."""


class _Hung(Exception):
    """An error for a process that works on one session for too long."""


class ReplacedProcess(ABC):
    """A connected helper process that is replaced when it ends or hangs.

    A subclass defines the process's work, and gives unfinished work to the new process again.
    """

    def __init__(self, start: Callable[[], ParserHost], watch: Callable[[ParserHost], HangWatch]) -> None:
        """Create the object; `run` starts the process.

        `start`: starts a process and blocks until the process exists. `watch`: returns the HangWatch of a process.
        """
        self._start = start
        self._watch = watch
        self._connection: ParserConnection | None = None
        self.replaced = 0
        """Number of processes that have been replaced."""

    @abstractmethod
    def _apply(self, connection: ParserConnection, reply: wire.Reply) -> None:
        """Handle a message from the process."""

    @abstractmethod
    def _fail_hung(self, number: int) -> None:
        """Fail the session at which the process hangs."""

    @abstractmethod
    def _record_death(self, number: int) -> None:
        """Record that the process has ended. `number`: the session on which the process worked; 0 for none."""

    async def run(self) -> None:
        """Until cancelled, run the process, and replace it whenever it ends."""
        while True:
            began, answered = time.monotonic(), False
            try:
                answered = await self._run_process()
            except OSError as error:
                log.warning("parser.not_started", reason=str(error))
            self.replaced += 1
            if not answered and time.monotonic() - began < RESTART_S:
                await asyncio.sleep(RESTART_S)

    def _send(self, message: wire.Request) -> None:
        """Send a message to the process.

        If no process is loaded, do nothing: the next process gets all unfinished work anyway.
        """
        if self._connection is not None and self._connection.is_ready:
            self._connection.send(message)

    async def _run_process(self) -> bool:
        """Run one process until it ends; return whether it had loaded its parsers or its renderer."""
        host = await asyncio.to_thread(self._start)
        connection: ParserConnection | None = None
        parts: list[asyncio.Task[None]] = []
        try:
            connection = self._connection = await ParserConnection.open(host)
            # No TaskGroup: that of Python 3.11 loses a cancellation that arrives while a task's error ends the group.
            parts = [asyncio.create_task(self._read(connection)), asyncio.create_task(self._check(host))]
            await wait_first(parts)
        except _Hung:
            log.error("parser.hung", process=type(self).__name__)
        except (OSError, EOFError, ValueError) as error:
            log.warning("parser.ended", process=type(self).__name__, reason=str(error))
        finally:
            self._connection = None
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
            parts.clear()
            if connection is not None:
                connection.close()
            await asyncio.shield(asyncio.to_thread(host.kill))
            self._record_death(host.progress.read()[0])
        return connection is not None and connection.is_ready

    async def _read(self, connection: ParserConnection) -> None:
        while True:
            self._apply(connection, await connection.receive())

    async def _check(self, host: ParserHost) -> None:
        """Check regularly whether the process hangs.

        If it does, fail the session at which it hangs, and raise _Hung.
        """
        watch = self._watch(host)
        while True:
            await asyncio.sleep(CHECK_S)
            if hung := watch.hung(time.monotonic()):
                self._fail_hung(hung)
                raise _Hung
