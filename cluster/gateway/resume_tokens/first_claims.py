"""Who resumes what: of all that show the same tokens, the first, whichever gateway it asks.

One atomic write decides: in the limits store where there is one and it answers, else in the ledger's database, else in
a file beside the secret under which the tokens were sealed, so that whoever can open them also sees who has taken them.
Without any of them nothing is resumed. A store that is lost, or away for one of two that ask, lets a second one
through; what that one gets was its own caller's to have, and is accounted.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

import structlog

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.batcher import Batcher
from cluster.ledger.errors import StoreUnavailable
from cluster.process.private_files import make_missing_folders, make_private_database

log = structlog.get_logger("resume")

BUSY_S = 5.0
Asked = tuple[str, float]
"""A name, and for how many seconds it is to be taken."""


class FirstClaims(Protocol):
    """Where it is decided."""

    async def take(self, name: str, expires_s: float) -> bool:
        """Whether nobody has taken this yet; nobody else will within `expires_s` seconds. Raises CallError."""


def away() -> CallError:
    """Nobody can say whether somebody else has it."""
    return CallError(
        Outcome.STORE_UNAVAILABLE, "neither the limits store nor the database answers: resume after the given pause"
    )


class FileFirstClaims:
    """In a file of SQLite's, for gateways of one host without a ledger: it outlives them, as their tokens do."""

    def __init__(self, path: Path, wall: Callable[[], float] = time.time) -> None:
        self._path = path
        self._wall = wall
        self._together = Batcher(self._take_all)

    async def take(self, name: str, expires_s: float) -> bool:
        """See Takers."""
        return await self._together((name, expires_s))

    async def _take_all(self, asked: Sequence[Asked]) -> Sequence[bool]:
        try:
            return await asyncio.to_thread(self._write, asked, self._wall())
        except (sqlite3.Error, OSError) as error:
            log.warning("resumes_not_kept", file=str(self._path), error=str(error))
            raise away() from None

    def _write(self, asked: Sequence[Asked], now_s: float) -> Sequence[bool]:
        make_missing_folders(self._path.parent)
        make_private_database(self._path)
        with closing(sqlite3.connect(self._path, timeout=BUSY_S)) as connection, connection:
            connection.execute("CREATE TABLE IF NOT EXISTS taken (name TEXT PRIMARY KEY, expires_at_s REAL NOT NULL)")
            connection.execute("DELETE FROM taken WHERE expires_at_s < ?", (now_s,))
            rows = [(name, now_s + expires_s) for name, expires_s in asked]
            return [connection.execute("INSERT OR IGNORE INTO taken VALUES (?, ?)", row).rowcount == 1 for row in rows]


class LedgerFirstClaims:
    """In the ledger's database."""

    def __init__(
        self,
        take: Callable[[Sequence[tuple[str, float]], float], Sequence[bool]],
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`take([(name, expires_at_s)], now_s)` writes and says who was the first; raises StoreUnavailable."""
        self._take = take
        self._wall = wall
        self._together = Batcher(self._take_all)

    async def take(self, name: str, expires_s: float) -> bool:
        """See Takers."""
        return await self._together((name, expires_s))

    async def _take_all(self, asked: Sequence[Asked]) -> Sequence[bool]:
        now_s = self._wall()
        try:
            return await asyncio.to_thread(self._take, [(name, now_s + expires_s) for name, expires_s in asked], now_s)
        except StoreUnavailable as error:
            log.warning("resumes_not_kept", error=str(error))
            raise away() from None


class StoreFirstClaims:
    """In the limits store, and elsewhere while that is away."""

    def __init__(self, first: Callable[[str, float], Awaitable[bool | None]], otherwise: FirstClaims) -> None:
        """`first(name, expires_s)` asks the store; None when it does not answer."""
        self._first = first
        self._otherwise = otherwise

    async def take(self, name: str, expires_s: float) -> bool:
        """See Takers."""
        found = await self._first(name, expires_s)
        return await self._otherwise.take(name, expires_s) if found is None else found
