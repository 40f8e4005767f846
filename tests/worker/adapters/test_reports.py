"""Reports of adapters: when a worker sends them, and to which links."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cluster.api.adapters import AdapterState, AdapterStatus
from cluster.wire.outbox import Outbox
from cluster.worker.adapters.reports import AdapterReports
from tests.support.cluster import until

READY = AdapterStatus("a", "d", AdapterState.READY, "")


class SentReports(Outbox):
    """An outbox that records each report."""

    def __init__(self) -> None:
        super().__init__()
        self.reports: list[list[AdapterStatus]] = []

    def adapters(self, statuses: object) -> None:
        """Record a report."""
        assert isinstance(statuses, list)
        self.reports.append(statuses)


@asynccontextmanager
async def running(reports: AdapterReports) -> AsyncIterator[None]:
    """Run the sender of reports while the context is open."""
    task = asyncio.create_task(reports.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_change_is_reported_once_to_every_link() -> None:
    """A new link gets a report at once. Several changes at the same time give one report to every link."""
    statuses: list[AdapterStatus] = []
    reports = AdapterReports(lambda: list(statuses), report_s=0.0)
    first, second, gone = SentReports(), SentReports(), SentReports()
    async with running(reports):
        for number, outbox in enumerate((first, second, gone)):
            reports.attach(number, outbox)
            assert outbox.reports == [[]]
        reports.detach(2)
        statuses.append(READY)
        reports.mark_changed()
        reports.mark_changed()
        await until(lambda: len(first.reports) == 2, "the change is reported")
        await asyncio.sleep(0.01)
    assert first.reports == second.reports == [[], [READY]]
    assert gone.reports == [[]]


async def test_moved_adapters_are_reported_later() -> None:
    """If adapters have only moved between slots, the report is delayed. Any other change is reported at once."""
    reports = AdapterReports(lambda: [READY], report_s=0.1)
    outbox = SentReports()
    reports.attach(1, outbox)
    async with running(reports):
        reports.mark_moved()
        await asyncio.sleep(0.02)
        assert len(outbox.reports) == 1, "the report waits"
        await until(lambda: len(outbox.reports) == 2, "the slots are reported")
        reports.mark_moved()
        reports.mark_changed()
        await until(lambda: len(outbox.reports) == 3, "the change is reported")
        await asyncio.sleep(0.5)
        assert len(outbox.reports) == 3, "the slots were reported with it"
