"""The upkeep of the ledger's database goes on after an error."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cluster.config.document import parse
from cluster.gateway.auth import ledger_upkeep
from cluster.gateway.auth.ledger_upkeep import LedgerUpkeep
from cluster.ledger.database import retention
from cluster.ledger.database.retention import Expired
from cluster.ledger.errors import StoreUnavailable
from cluster.ledger.store import Ledger
from tests.support.keyed import keyed_text


async def test_one_error_does_not_end_the_daily_deletion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expired rows are deleted on the day after an error, whatever kind of error it was."""
    problems: list[Exception] = [StoreUnavailable("it is away"), RuntimeError("invalid SQL")]
    deleted = asyncio.Event()
    loop = asyncio.get_running_loop()

    def expire(*_: object, **__: Any) -> Expired:
        if problems:
            raise problems.pop(0)
        loop.call_soon_threadsafe(deleted.set)
        return Expired(1, 1)

    monkeypatch.setattr(retention, "expire", expire)
    monkeypatch.setattr(ledger_upkeep, "FIRST_EXPIRY_S", 0.0)
    monkeypatch.setattr(ledger_upkeep, "EXPIRY_S", 0.01)
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    running = asyncio.create_task(LedgerUpkeep(parse(keyed_text(tmp_path)), ledger, ()).expire())
    try:
        await asyncio.wait_for(deleted.wait(), 30)
    finally:
        running.cancel()
        ledger.close()
