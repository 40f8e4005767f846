"""Whatever a worker reports of a request, a usage record can be made of it, or only this record is lost."""

from __future__ import annotations

from pathlib import Path

import structlog
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.outcomes import Outcome
from cluster.gateway.usage.accounting import Accounting
from cluster.gateway.usage.call_account import CallAccount
from cluster.ledger.usage.records import MAX_NAME, OpenRecord, UsageRecord
from cluster.ledger.usage.sealed_records import Sealer
from cluster.wire.ended_requests import EndedUsage

PROMPT = 12
COUNTS = {"outcome": Outcome.OK.value, "completion_tokens": 3, "generated_tokens": 3, "duration_s": 1.0}
uint32 = st.integers(0, 2**32 - 1)


def ended_account(name: str) -> CallAccount:
    """Return the account of a sequence that has ended; the engine's counts are still missing."""
    record = OpenRecord(name, "t", "k", "m", "v1", "q", 0.0, prompt_tokens=PROMPT)
    return CallAccount(record, name.encode(), awaited=1, counts=dict(COUNTS), admitted=True)


@given(st.text(max_size=3 * MAX_NAME), uint32, uint32)
def test_a_record_can_be_made_of_any_report(gpu: str, cached: int, generated: int) -> None:
    """The record has a name of the accelerator that fits the database, and at most as many cached tokens as the prompt
    has."""
    account = ended_account("r")
    account.apply_report("w1", EndedUsage(b"r", PROMPT, cached, generated, 3, 0, 1.0, gpu, "ok", 1.0, "", 0.0, 1))
    record = account.close()
    assert record is not None
    assert record.cached_tokens == min(cached, PROMPT)
    assert record.generated_tokens == max(generated, 3)
    assert record.gpu == gpu or len(record.gpu) <= MAX_NAME or "\0" in gpu


async def test_a_record_that_cannot_be_made_stops_no_other(tmp_path: Path) -> None:
    """If no record can be made of what was reported, this is logged, and the records after it are written."""
    made: list[UsageRecord] = []
    accounting = Accounting(
        incarnation="i", sealer=Sealer([b"s" * 32]), folder=tmp_path, insert=lambda records: None, grace_s=0.0
    )
    accounting.on_record = made.append
    accounting.start()
    impossible, good = ended_account("r1"), ended_account("r2")
    impossible.generated_tokens = 1 << 60
    with structlog.testing.capture_logs() as logs:
        accounting._finish([impossible, good], 0.0)
        await accounting.stop()
    assert [record.record_id for record in made] == ["r2"]
    assert [log["record"] for log in logs if log["event"] == "usage.record_refused"] == ["r1"]
