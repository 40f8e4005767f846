"""Whatever a worker reports of a request, a usage record can be made of it, or only this record is lost. A worker's
reports change no record but those of requests that were sent to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.outcomes import Outcome
from cluster.api.types import EngineInfo, WorkerIdentity
from cluster.gateway.links.liveness import LinkLiveness
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.usage.accounting import Accounting
from cluster.gateway.usage.call_account import CallAccount
from cluster.ledger.usage.records import MAX_NAME, OpenRecord, UsageRecord
from cluster.ledger.usage.sealed_records import Sealer
from cluster.wire.ended_requests import EndedUsage
from tests.support.cluster import until
from tests.support.links import NoListener

PROMPT = 12
INFO = EngineInfo("c", "sim", "0", 16, 64, 8, 64, 2048, 256)
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


SEALER = Sealer([b"s" * 32])
VICTIM = WorkerIdentity("sim-1", "abc", "sim")
STRANGER = WorkerIdentity("other-1", "abc", "other")
"""A worker with another model's certificate, which has seen the incarnation of the first worker."""


class Written:
    """An accounting with the records that it has written."""

    def __init__(self, folder: Path) -> None:
        self.records: list[UsageRecord] = []
        self.accounting = Accounting(incarnation="i", sealer=SEALER, folder=folder, insert=self._insert)

    def _insert(self, records: Sequence[UsageRecord]) -> None:
        self.records += records

    async def report(self, worker: WorkerIdentity, *reports: EndedUsage) -> list[UsageRecord]:
        """Apply reports of a worker, and return the records that were written since the last call."""
        link = WorkerLink(worker, INFO, 1, NoListener(), LinkLiveness(0.0, 1.0, 1.0))
        self.accounting.usage(link, reports)
        await until(lambda: not self.accounting.statistics().pending, "all is in the database")
        new, self.records = self.records, []
        return new


@pytest.fixture
async def written(tmp_path: Path) -> AsyncIterator[Written]:
    """Provide a running accounting."""
    made = Written(tmp_path)
    made.accounting.start()
    yield made
    await made.accounting.stop()


def idle(idle_id: str, key: int = 1) -> EndedUsage:
    """Return a report of one second of idle time."""
    return EndedUsage(b"", gpu_seconds=1.0, duration_s=1.0, idle_id=idle_id, key=key)


def sealed(model: str, key: int = 1) -> EndedUsage:
    """Return a report of a request that a lost gateway has sent to a worker of a model."""
    record = OpenRecord("lost.1-ab.0", "t", "k", model, "v1", "q", 0.0, prompt_tokens=PROMPT)
    return EndedUsage(SEALER.seal(record), PROMPT, 0, 3, 3, outcome="OK", key=key)


ALIEN = ["i.1.0", "i.1-ab.0", "", "idle-abd-1", "idle-abc-", "idle-abc-x", "idle-abc-1-2", "idle-abc-" + "9" * 500]


@pytest.mark.parametrize("idle_id", ALIEN)
async def test_an_idle_report_names_the_workers_own_incarnation(written: Written, idle_id: str) -> None:
    """An idle report with the id of a call's record or of another worker is refused and counted."""
    assert await written.report(VICTIM, idle(idle_id)) == []
    assert written.accounting.refused == {"idle_id": 1}


async def test_idle_rows_of_two_models_never_have_one_id(written: Written) -> None:
    """A worker that takes another model's incarnation gets rows of its own, and a repeated report has the same row."""
    (mine,) = await written.report(VICTIM, idle("idle-abc-7"))
    (alien,) = await written.report(STRANGER, idle("idle-abc-7"))
    (again,) = await written.report(VICTIM, idle("idle-abc-7", key=2))
    assert mine.record_id == again.record_id != alien.record_id
    assert not mine.record_id.startswith("i."), "an id of a call's record"


async def test_a_lost_gateways_request_is_reported_by_its_model_only(written: Written) -> None:
    """The usage of a lost gateway's request is written if a worker of the request's model reports it. A report of
    another model's worker is refused and counted."""
    assert await written.report(STRANGER, sealed("sim")) == []
    assert written.accounting.refused == {"not_sent": 1}
    (record,) = await written.report(VICTIM, sealed("sim"))
    assert (record.record_id, record.completion_tokens) == ("lost.1-ab.0", 3)


async def test_an_open_account_takes_reports_of_its_workers_only(written: Written) -> None:
    """A worker to which a request was not sent cannot report the request's usage, even if it knows the seal."""
    account = ended_account("r")
    account.add_worker(VICTIM)
    written.accounting.accounts._by_seal[account.sealed] = account
    assert await written.report(STRANGER, EndedUsage(account.sealed, generated_tokens=9, key=1)) == []
    assert not account.written
    (record,) = await written.report(VICTIM, EndedUsage(account.sealed, generated_tokens=5, key=1))
    assert (record.record_id, record.generated_tokens) == ("r", 5)


async def test_a_flood_of_reports_is_logged_once(written: Written) -> None:
    """Refused reports make one line in the log, however many they are."""
    with structlog.testing.capture_logs() as logs:
        for _ in range(20):
            await written.report(STRANGER, *(idle(f"i.{n}.0", n) for n in range(50)))
    assert [entry["event"] for entry in logs] == ["usage.report_refused"]
