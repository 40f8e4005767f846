"""First claims: of all resumes with the same resume tokens, only the first succeeds.

The claims are kept in the limits store. Without a limits store, they are kept in the database; without a
database, in a file. Without any of these, no call is resumed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.quotas.valkey_limits import ValkeyLimits
from cluster.gateway.resume_tokens.first_claims import FileFirstClaims, FirstClaims, LedgerFirstClaims, StoreFirstClaims
from cluster.ledger.errors import StoreUnavailable
from tests.gateway.quotas.test_valkey_limits import server
from tests.support.valkey import Server

__all__ = ["server"]


async def firsts(stores: list[FirstClaims], name: str) -> int:
    """Claim a name four times at once in each store, and return the number of claims that were granted as first."""
    return sum(await asyncio.gather(*(store.claim_first(name, 60.0) for store in stores * 4)))


async def test_a_file_outlives_its_gateways(tmp_path: Path) -> None:
    """Of two gateways on one host that claim the same resume, one is the first. A restarted gateway knows earlier
    claims. Expired claims are forgotten."""
    now = 100.0
    file = tmp_path / "new" / "resumed.db"
    assert await firsts([FileFirstClaims(file, lambda: now), FileFirstClaims(file, lambda: now)], "a.1") == 1
    assert not await FileFirstClaims(file, lambda: now).claim_first("a.1", 60.0)
    assert await FileFirstClaims(file, lambda: now).claim_first("a.2", 60.0)
    now = 161.0
    assert await FileFirstClaims(file, lambda: now).claim_first("a.1", 60.0)


def unavailable(names: Sequence[tuple[str, float]], now_s: float) -> Sequence[bool]:
    """Raise StoreUnavailable, like a database that does not answer."""
    raise StoreUnavailable("it is away")


def defective(names: Sequence[tuple[str, float]], now_s: float) -> Sequence[bool]:
    """Raise an error that is not StoreUnavailable."""
    raise RuntimeError("invalid SQL")


async def test_without_a_store_nothing_is_resumed(tmp_path: Path) -> None:
    """If no store answers, or a store fails in any way, a claim fails with STORE_UNAVAILABLE and a retry delay."""
    (tmp_path / "file").write_text("no folder")
    ledgers = LedgerFirstClaims(unavailable), LedgerFirstClaims(defective)
    for stores in (*ledgers, FileFirstClaims(tmp_path / "file" / "resumed.db")):
        with pytest.raises(CallError) as raised:
            await stores.claim_first("a.1", 60.0)
        assert raised.value.outcome is Outcome.STORE_UNAVAILABLE
        assert raised.value.retry_after_s


@pytest.mark.slow
async def test_the_limits_store_decides_while_it_answers(server: Server, tmp_path: Path) -> None:
    """Two gateways with one limits store agree on the first claim. While the limits store is unavailable, a second
    store decides instead. If both stores are unavailable, the claim fails."""
    limits = [ValkeyLimits(server.url, f"g{i}") for i in range(2)]
    for one in limits:
        await one.store.start()
    try:
        file = FileFirstClaims(tmp_path / "resumed.db")
        both: list[FirstClaims] = [StoreFirstClaims(one.store.first, file) for one in limits]
        assert await firsts(both, "a.1") == 1
        assert not (tmp_path / "resumed.db").exists(), "the store alone is asked"
        await server.stop()
        assert await firsts(both, "a.2") == 1
        assert limits[0].degraded
        with pytest.raises(CallError):
            await StoreFirstClaims(limits[0].store.first, LedgerFirstClaims(unavailable)).claim_first("a.3", 60.0)
    finally:
        for one in limits:
            await one.store.close()
