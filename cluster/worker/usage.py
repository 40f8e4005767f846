"""What a worker keeps account of: its replica's GPU time, and ended requests' counts until a gateway has them for good.

The rules are ended_requests.py's and gpu_meter.py's; this has the clock, the links, and the times at which to tell.
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
from cluster.worker.gpu_meter import GpuMeter, GpuShare

log = structlog.get_logger("worker")


class WorkerUsage:
    """The accounts of one worker."""

    def __init__(
        self,
        incarnation: str,
        keeper: UsageKeeper,
        meter: GpuMeter,
        gpu: str,
        idle_report_s: float,
        running: Callable[[], Iterable[tuple[GpuShare, int]]],
    ) -> None:
        """`running` gives share and generated tokens of each request that runs; `gpu` is the type of the replica's
        GPUs, whose idle time is told every `idle_report_s`."""
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
        """Records kept, and dropped."""
        return self._keeper.statistics()

    def attach(self, link: int, outbox: Outbox) -> None:
        """A gateway that keeps accounts is linked."""
        self._outboxes[link] = outbox
        outbox.usage = lambda: self._keeper.take(link, time.monotonic())
        self._keeper.attach(link)
        outbox.flush()

    def detach(self, link: int, outbox: Outbox) -> None:
        """A link has ended: what it has not acknowledged is told to another, without what was never written to it."""
        self._outboxes.pop(link, None)
        self._keeper.detach(link, outbox.unwritten())
        self._tell()

    def keep(self, usage: EndedUsage, link: int, slot: int) -> None:
        """A request of this link has ended."""
        self._keeper.keep(usage, link, slot)
        if (outbox := self._outboxes.get(link)) is not None:
            outbox.flush()

    def acked(self, keys: Iterable[int]) -> None:
        """A gateway has these for good."""
        self._keeper.acked(keys)
        self._acked.set()

    async def look_after(self) -> None:
        """Tell idle time, and turn to other gateways where one does not acknowledge; until cancelled."""
        dropped = 0
        while True:
            await asyncio.sleep(self._idle_report_s)
            if self._outboxes:
                self._report_idle()
            self._keeper.hurry(time.monotonic())
            self._tell()
            kept = self._keeper.statistics()
            if kept.dropped > dropped:
                log.error("usage_dropped", records=kept.dropped - dropped, kept=kept.kept)
                dropped = kept.dropped

    async def hand_over(self, timeout_s: float) -> None:
        """Before the end: the last idle time, and a while for gateways to acknowledge."""
        if not self._outboxes:
            return
        self._report_idle()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._keeper.statistics().kept:
                    self._acked.clear()
                    await self._acked.wait()

    def _report_idle(self) -> None:
        """The replica's time since the last report that no request owes, as a record of its own."""
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
            self._tell()
        self._idle_since_s = now_s

    def _tell(self) -> None:
        for link, outbox in self._outboxes.items():
            if self._keeper.due(link):
                outbox.flush()
