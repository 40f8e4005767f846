"""Check that the ledger has the record of every call exactly once."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loadtests.faults.calls import CallResult

CAUGHT_UP_S = 60.0
"""Time in seconds in which all records must arrive. A record waits ten seconds for the counts of a lost worker."""
LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class LedgerAudit:
    """Number of sequences with an answer, and the numbers of missing, doubled and miscounted ledger rows."""

    sequences: int
    missing: int
    doubled: int
    miscounted: int
    """Number of calls whose rows hold other token counts than the caller received."""

    @property
    def wrong(self) -> int:
        """Number of usage rows in the ledger that are missing or doubled."""
        return self.missing + self.doubled

    def __add__(self, other: LedgerAudit) -> LedgerAudit:
        return LedgerAudit(
            self.sequences + other.sequences, self.missing + other.missing, self.doubled + other.doubled,
            self.miscounted + other.miscounted,
        )  # fmt: skip


async def audit(ledger: Path, calls: Sequence[CallResult]) -> LedgerAudit:
    """Compare the calls with the ledger, once the records of all calls have had time to arrive."""
    answered = [result for result in calls if not result.error]
    deadline = time.monotonic() + CAUGHT_UP_S
    while True:
        books = await asyncio.to_thread(_compare, ledger, answered)
        if not (books.missing or books.miscounted) or time.monotonic() > deadline:
            return books
        await asyncio.sleep(LOOK_S)


def _compare(ledger: Path, calls: Sequence[CallResult]) -> LedgerAudit:
    rows = Counter[tuple[str, int]]()
    tokens = Counter[str]()
    with sqlite3.connect(f"file:{ledger}?mode=ro", uri=True, timeout=10) as database:
        for request_id, segment, completion in database.execute(
            "SELECT request_id, segment, completion_tokens FROM usage"
        ):
            rows[request_id, segment] += 1
            tokens[request_id] += completion
    wanted = [(result.request_id, segment) for result in calls for segment in range(max(result.request.message.n, 1))]
    return LedgerAudit(
        sequences=len(wanted),
        missing=sum(not rows[sequence] for sequence in wanted),
        doubled=sum(count - 1 for count in rows.values()),
        miscounted=sum(
            result.usage is not None and tokens[result.request_id] != result.usage.completion_tokens for result in calls
        ),
    )
