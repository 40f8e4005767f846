"""A worker's usage accounts: its replica's GPU time, and records of ended requests. A record is kept until a gateway
acknowledges it.

The rules are in ended_requests.py and gpu_meter.py. This module adds the clock, the links and the timing of reports.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterable

import structlog

from cluster.wire.ended_requests import EndedUsage, KeeperStatistics, UsageKeeper
from cluster.wire.outbox import Outbox
from cluster.worker.accounts.gpu_meter import GpuMeter, GpuShare

log = structlog.get_logger("worker")


class WorkerUsage:
    """The usage accounts of one worker."""

    def __init__(
        self,
        incarnation: str,
        keeper: UsageKeeper,
        meter: GpuMeter,
        gpu: str,
        idle_report_s: float,
        running: Callable[[], Iterable[tuple[GpuShare, int]]],
    ) -> None:
        """Create the accounts.

        `gpu`: the type of the replica's GPUs. The idle time of the GPUs is reported every `idle_report_s` seconds.
        `running` returns the running requests, each with its GpuShare and number of generated tokens. GPU time that
        these requests owe is not idle time.
        """
        self.meter = meter
        self.gpu = gpu
        self._incarnation = incarnation
        self._keeper = keeper
        self._idle_report_s = idle_report_s
        self._running = running
        self._outboxes: dict[int, Outbox] = {}
        self._idle_since_s = time.time()
        self._idle_reports = itertools.count(1)
        self._acked = asyncio.Event()

    def statistics(self) -> KeeperStatistics:
        """Return the number of records that are kept and the number that were dropped."""
        return self._keeper.statistics()

    def attach(self, link: int, outbox: Outbox) -> None:
        """Add the link of a gateway that writes to the ledger."""
        self._outboxes[link] = outbox
        outbox.usage = lambda: self._keeper.pop_due(link, time.monotonic())
        self._keeper.attach(link)
        outbox.flush()

    def detach(self, link: int, outbox: Outbox) -> None:
        """Remove a link that has ended. Records that the link has not acknowledged go to another link.

        If output tokens of a request were never written to the ended link, `written_tokens` in the request's record is
        lowered by their number.
        """
        self._outboxes.pop(link, None)
        self._keeper.detach(link, outbox.unwritten())
        self._flush_due()

    def keep(self, usage: EndedUsage, link: int, slot: int) -> None:
        """Keep the usage record of an ended request until a gateway acknowledges the record.

        `link`, `slot`: those of the request.
        """
        self._keeper.keep(usage, link, slot)
        if (outbox := self._outboxes.get(link)) is not None:
            outbox.flush()

    def acked(self, keys: Iterable[int]) -> None:
        """Drop records that a gateway has acknowledged."""
        self._keeper.acknowledge(keys)
        self._acked.set()

    async def run(self) -> None:
        """Run until cancelled. In regular passes, report the GPU's idle time. If a gateway does not acknowledge usage
        records in time, move these records to other links."""
        dropped = 0
        while True:
            await asyncio.sleep(self._idle_report_s)
            if self._outboxes:
                self._report_idle()
            self._keeper.reassign_late(time.monotonic())
            self._flush_due()
            kept = self._keeper.statistics()
            if kept.dropped > dropped:
                log.error("worker.usage_dropped", records=kept.dropped - dropped, kept=kept.kept)
                dropped = kept.dropped

    async def flush(self, timeout_s: float) -> None:
        """Report the last idle time, and wait at most `timeout_s` until gateways have acknowledged every record."""
        if not self._outboxes:
            return
        self._report_idle()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._keeper.statistics().kept:
                    self._acked.clear()
                    await self._acked.wait()

    def _report_idle(self) -> None:
        """Keep a usage record of the idle time (GPU time that is charged to no request) since the last report."""
        gpu_seconds = self.meter.idle(time.monotonic(), list(self._running()))
        now_s = time.time()
        if gpu_seconds > 0:
            usage = EndedUsage(
                b"",
                gpu_seconds=gpu_seconds,
                gpu=self.gpu,
                duration_s=max(now_s - self._idle_since_s, 0.0),
                idle_id=f"idle-{self._incarnation}-{next(self._idle_reports)}",
                idle_since_s=self._idle_since_s,
            )
            self._keeper.keep(usage, 0)
            self._flush_due()
        self._idle_since_s = now_s

    def _flush_due(self) -> None:
        for link, outbox in self._outboxes.items():
            if self._keeper.has_due(link):
                outbox.flush()
