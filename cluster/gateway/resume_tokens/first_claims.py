"""Decision on several resumes of the same stream. Of all resumes with the same resume tokens, only the first succeeds,
whichever gateways receive them.

The first resume is decided by an atomic write to a store: the claim. The store is the limits store, if one is
configured. If there is none, or if it does not answer, the store is the ledger's database. Without a ledger, the store
is a file in the folder that holds the secret with which the tokens were sealed. So every gateway that can open the
tokens sees the claims on them.

If no store answers, nothing is resumed. A second resume may succeed if a store loses its data, or if one of two
gateways cannot connect to a store that the other gateway uses.
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
Requested = tuple[str, float]
"""A name, and the number of seconds for which the name is claimed."""


class FirstClaims(Protocol):
    """A store in which only the first claim on a name succeeds."""

    async def claim_first(self, name: str, expires_s: float) -> bool:
        """Claim a name for `expires_s` seconds. Returns whether this is the first claim on the name. Raises
        CallError."""


def stores_unavailable() -> CallError:
    """Return the error for a resume that must be refused because no store answers. A store decides whether the resume
    tokens are used for the first time."""
    return CallError(
        Outcome.STORE_UNAVAILABLE, "neither the limits store nor the database answers: resume after the given delay"
    )


class FileFirstClaims:
    """First claims in a SQLite file: it records the resume tokens that were used, so that only the first resume with
    the same tokens succeeds. It is for gateways of one host that have no ledger. Like the resume tokens, the file
    outlives the gateways."""

    def __init__(self, path: Path, wall: Callable[[], float] = time.time) -> None:
        self._path = path
        self._wall = wall
        self._batcher = Batcher(self._claim_all)

    async def claim_first(self, name: str, expires_s: float) -> bool:
        """Implements `FirstClaims.claim_first`."""
        return await self._batcher((name, expires_s))

    async def _claim_all(self, requested: Sequence[Requested]) -> Sequence[bool]:
        try:
            return await asyncio.to_thread(self._write, requested, self._wall())
        except (sqlite3.Error, OSError) as error:
            log.warning("resume.claims_not_written", file=str(self._path), error=str(error))
            raise stores_unavailable() from None

    def _write(self, requested: Sequence[Requested], now_s: float) -> Sequence[bool]:
        make_missing_folders(self._path.parent)
        make_private_database(self._path)
        with closing(sqlite3.connect(self._path, timeout=BUSY_S)) as connection, connection:
            connection.execute("CREATE TABLE IF NOT EXISTS taken (name TEXT PRIMARY KEY, expires_at_s REAL NOT NULL)")
            connection.execute("DELETE FROM taken WHERE expires_at_s < ?", (now_s,))
            rows = [(name, now_s + expires_s) for name, expires_s in requested]
            return [connection.execute("INSERT OR IGNORE INTO taken VALUES (?, ?)", row).rowcount == 1 for row in rows]


class LedgerFirstClaims:
    """First claims in the ledger's database."""

    def __init__(
        self,
        claim: Callable[[Sequence[tuple[str, float]], float], Sequence[bool]],
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`claim([(name, expires_at_s)], now_s)`: claims the names. Returns, for each name, whether the claim was the
        first. Raises StoreUnavailable."""
        self._claim = claim
        self._wall = wall
        self._batcher = Batcher(self._claim_all)

    async def claim_first(self, name: str, expires_s: float) -> bool:
        """Implements `FirstClaims.claim_first`."""
        return await self._batcher((name, expires_s))

    async def _claim_all(self, requested: Sequence[Requested]) -> Sequence[bool]:
        now_s = self._wall()
        try:
            return await asyncio.to_thread(
                self._claim, [(name, now_s + expires_s) for name, expires_s in requested], now_s
            )
        except StoreUnavailable as error:
            log.warning("resume.claims_not_written", error=str(error))
            raise stores_unavailable() from None
        except Exception:  # without a written claim, two gateways could resume the same stream
            log.exception("resume.claims_not_written")
            raise stores_unavailable() from None


class StoreFirstClaims:
    """Decides in the limits store which gateway is the first to claim a call for a resume. While the limits store is
    unavailable, another store decides."""

    def __init__(self, first: Callable[[str, float], Awaitable[bool | None]], otherwise: FirstClaims) -> None:
        """`first(name, expires_s)`: claims a name in the limits store. Returns whether the claim was the first; None if
        the limits store does not answer. `otherwise`: decides the claim if the limits store does not answer."""
        self._first = first
        self._otherwise = otherwise

    async def claim_first(self, name: str, expires_s: float) -> bool:
        """Implements `FirstClaims.claim_first`."""
        is_first = await self._first(name, expires_s)
        return await self._otherwise.claim_first(name, expires_s) if is_first is None else is_first
