"""The links of one worker while they are open. Messages are passed in both directions, and the worker's reports are
sent.

When a link ends, the worker aborts the link's requests in the engine, and the gateway decides what happens to the
calls. Requests that another gateway may resume run on for a moment (detached_requests.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.api.ports import EngineDead
from cluster.http2.client import ClientCall
from cluster.wire.dial import LinkEnded, read, wait_first
from cluster.worker.accounts.served_reports import ServedReports
from cluster.worker.accounts.usage import WorkerUsage
from cluster.worker.adapters.worker_adapters import WorkerAdapters
from cluster.worker.drain_state import DrainStates
from cluster.worker.engine_runner import EngineRunner
from cluster.worker.gateway_messages import GatewayMessages
from cluster.worker.kv_events.reports import KvReports
from cluster.worker.link import Link, LinkOpener
from cluster.worker.link_credit import LinkCredit
from cluster.worker.running_requests import RunningRequests

GATEWAY_SILENT_S = 1.0
"""Seconds without a beat after which a gateway counts as lost, when one of its calls is resumed through another
gateway. A gateway sends ten beats a second."""
END_REASON_S = 0.5
"""Seconds that a worker with an ended engine waits for its gateways to read the reason and close their links.

If the worker closed a link first, the reset of the connection could arrive before the reason.
"""


class OpenLinks:
    """The open links of one worker."""

    def __init__(self) -> None:
        self.engine_ended = ""
        """Reason why the worker's engine has ended; "" until it ends. No link is opened afterwards."""
        self._by_number: dict[int, Link] = {}
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._by_number)

    def add(self, link: Link) -> None:
        """Add a new link."""
        self._by_number[link.number] = link
        self._empty.clear()

    def remove(self, link: Link) -> None:
        """Remove a link that has ended."""
        self._by_number.pop(link.number, None)
        if not self._by_number:
            self._empty.set()

    def is_gateway_lost(self, incarnation: str) -> bool:
        """Return whether a gateway counts as lost: the worker has no link to it, or no heartbeats arrive on any link to
        it."""
        links = (link for link in self._by_number.values() if link.incarnation == incarnation)
        return all(link.heartbeats.silent_s > GATEWAY_SILENT_S for link in links)

    def record_engine_end(self, reason: str) -> None:
        """Record why the engine has ended. If there are several reasons, the first that is not empty is kept."""
        self.engine_ended = self.engine_ended or reason

    async def report_engine_end(self) -> None:
        """If the engine has ended, send the reason to every gateway and wait until the gateways have closed their
        links."""
        if not self.engine_ended:
            return
        for link in self._by_number.values():
            link.outbox.engine_ended(self.engine_ended)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_REASON_S):
                await self._empty.wait()


@dataclass(frozen=True, slots=True)
class GatewayReports:
    """The reports of a worker to its gateways.

    Usage is sent only to gateways that write to the ledger; the other reports are sent to all gateways.
    """

    usage: WorkerUsage
    served: ServedReports
    kv_blocks: KvReports
    adapters: WorkerAdapters

    def attach(self, link: Link) -> None:
        """Add a link, so that its gateway gets the reports from now on."""
        if link.accounts:
            self.usage.attach(link.number, link.outbox)
        self.served.attach(link.number, link.incarnation, link.outbox)
        self.kv_blocks.attach(link.number, link.outbox)
        self.adapters.attach(link.number, link.outbox)

    def detach(self, link: Link) -> None:
        """Remove a link that has ended."""
        self.served.detach(link.number)
        self.kv_blocks.detach(link.number)
        self.adapters.detach(link.number)
        self.usage.detach(link.number, link.outbox)


@dataclass(frozen=True, slots=True)
class LinkRunner:
    """Opens the links of one worker, runs each link until it ends, and then releases what the link held.

    `closed`: set when the worker is to end. Requests of a link that ends afterwards are aborted.
    """

    opener: LinkOpener
    links: OpenLinks
    messages: GatewayMessages
    reports: GatewayReports
    credit: LinkCredit
    drain_state: DrainStates
    requests: RunningRequests
    runner: EngineRunner
    closed: asyncio.Event

    async def run(self, address: str) -> None:
        """Open a link to the gateway at `host:port`, and run it until it ends. Then raise LinkEnded."""
        if self.links.engine_ended:
            raise LinkEnded("the engine has ended")
        async with self.opener.open(address) as (link, call, bulk):
            self._attach(link)
            parts = [
                asyncio.create_task(self._read(link, call)),
                asyncio.create_task(_write(link, call)),
                asyncio.create_task(bulk),
                asyncio.create_task(self._watch(link)),
            ]
            try:
                await wait_first(parts)
            finally:
                await self._detach(link, parts)
                parts.clear()

    def _attach(self, link: Link) -> None:
        self.links.add(link)
        self.reports.attach(link)
        self.credit.attach(link.credit_order, link.outbox)
        self.credit.regrant()
        self.drain_state.attach(link.outbox, time.monotonic())

    async def _detach(self, link: Link, parts: Sequence[asyncio.Task[None]]) -> None:
        """Release everything that a link held, and revoke its credit.

        While the worker keeps serving, requests that have output are detached: they run on for a while, so that
        another gateway can claim them. All other requests of the link are aborted in the engine.
        """
        self.links.remove(link)
        self.drain_state.detach(link.outbox)
        self.credit.detach(link.credit_order)
        link.heartbeats.stop()
        to_abort = self.requests.detach_link(link, stays=self.drain_state.serves and not self.closed.is_set())
        self.reports.detach(link)  # after the requests, whose usage records then go to another link
        for task in (*parts, *link.tasks):
            task.cancel()
        await asyncio.gather(*parts, *link.tasks, return_exceptions=True)
        if to_abort:
            with contextlib.suppress(EngineDead):
                await self.runner.engine.abort(to_abort)
        self.credit.regrant()

    async def _watch(self, link: Link) -> None:
        """Check the link once per heartbeat interval. Send the engine's load, if no other message was sent since the
        last check.

        Raises LinkEnded if the gateway sends no heartbeats, does not read, or does not acknowledge grants.
        """
        timing, sent = self.opener.timing, 0
        while True:
            await asyncio.sleep(timing.beat_s)
            if (silent_s := link.heartbeats.silent_s) > timing.silence_s:
                raise LinkEnded(f"no beat from the gateway for {silent_s:.1f} s")
            if link.outbox.full:
                raise LinkEnded("the gateway does not read; its outbox is full")
            if self.credit.unacked_s(link.credit_order) > timing.silence_s:
                raise LinkEnded("the gateway sends beats but does not acknowledge its grants")
            link.outbox.work(self.runner.work(self.requests.outputs))
            if link.outbox.sent_seq == sent:  # otherwise a step has sent the load
                link.outbox.load(self.runner.engine.load())
                link.outbox.flush()
            sent = link.outbox.sent_seq

    async def _read(self, link: Link, call: ClientCall) -> None:
        while (message := await read(call)) is not None:
            try:
                await self.messages.apply(link, message)
            except (ValueError, LookupError) as error:  # the gateway's fault: end only its link
                raise LinkEnded(f"the gateway sent an invalid message: {error}") from error


async def _write(link: Link, call: ClientCall) -> None:
    while True:
        await call.write(await link.outbox.next_message())
