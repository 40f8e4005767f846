"""The links of all connected workers, from each worker's Hello message to the end of its link."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import structlog

from cluster.api.types import CatalogEntry, EngineInfo, WorkerIdentity
from cluster.gateway.links.liveness import LinkLiveness, Waking
from cluster.gateway.links.report_costs import FAULT, ReportCosts
from cluster.gateway.links.worker_fields import worker_fields
from cluster.gateway.links.worker_link import LinkListener, WorkerLink
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.dial import Timing, read
from cluster.wire.lost_engines import LostEngines

log = structlog.get_logger("hub")

CHECKS = 10
"""Minimum number of liveness checks within the time after which an inactive worker is suspected."""
LEAST_REST_S = 0.002
CHECK_S = 0.1
"""Seconds between liveness checks while all workers are active."""
CALM = 0.6
"""Fraction of `hang_s`. Checks run every CHECK_S while the time until the first worker would be suspected is longer
than this fraction of `hang_s` and longer than 2 * CHECK_S."""
NOTICING_S = 0.02
"""Seconds that the detection itself may take. They are subtracted from `hang_s`, the minimum time before an inactive
worker is suspected."""


class HubListener(LinkListener, Protocol):
    """The receiver of a hub's events. The methods are called on the event loop and must not block."""

    @property
    def keeps_accounts(self) -> bool:
        """Whether the usage of ended requests is recorded."""

    def link_up(self, link: WorkerLink) -> None:
        """Handle the beginning of a worker's link."""

    def link_down(self, link: WorkerLink, why: str) -> None:
        """Handle the end of a worker's link. The link's requests have been reported as lost before this call."""

    def link_changed(self, link: WorkerLink) -> None:
        """Handle a change of a worker's credit or drain state."""

    def apply_catalog(self, entries: Sequence[CatalogEntry], revision: int = 0) -> None:
        """Handle a new catalog from the controller."""

    def refusal_of(self, identity: WorkerIdentity) -> str:
        """Return the reason why a worker may not serve its model; "" if the worker may serve."""


class WorkerLinks:
    """The links of all workers, keyed by worker id and model, and the detection of lost workers. A worker has only one
    link: when it reconnects, its earlier link ends. The model is in the key because a certificate proves no more: a
    worker of another model may have any worker id."""

    def __init__(self, listener: HubListener, timing: Timing, on_change: Callable[[], None]) -> None:
        """`on_change` is called when a link has begun or ended."""
        self._listener = listener
        self._timing = timing
        self._on_change = on_change
        self._links: dict[tuple[str, str], WorkerLink] = {}
        self._applying: set[asyncio.Task[None]] = set()
        self._waking = Waking(time.monotonic(), timing.hang_s / CHECKS)
        self.costs = ReportCosts()
        self.lost = LostEngines()
        """The engines that have ended, with the reasons that the workers reported."""

    @property
    def links(self) -> Sequence[WorkerLink]:
        """All links, sorted by worker id."""
        return [self._links[key] for key in sorted(self._links)]

    def with_id(self, worker_id: str) -> Sequence[WorkerLink]:
        """Return the links with a worker id: none or one, and more only if workers of several models have this id."""
        return [link for (name, _), link in self._links.items() if name == worker_id]

    def find(self, worker_id: str, incarnation: str, epoch: int) -> Sequence[WorkerLink]:
        """Return the links that are this connection (epoch) of a worker, as `with_id` does."""
        return [
            link for link in self.with_id(worker_id) if (link.identity.incarnation, link.epoch) == (incarnation, epoch)
        ]

    async def serve(
        self, identity: WorkerIdentity, info: EngineInfo, epoch: int, context: Any, welcome: pb.Welcome
    ) -> WorkerLink:
        """Serve one connection (epoch) of a worker, from the Welcome message to the end of the link. Returns the ended
        link."""
        liveness = LinkLiveness(self._now(), self._timing.hang_s - NOTICING_S, self._timing.silence_s)
        link = WorkerLink(identity, info, epoch, self._listener, liveness)
        self._attach(link)  # before the Welcome: once the worker has read the Welcome, it may open Bulk
        parts = [
            asyncio.create_task(self._write(link, context, welcome)),
            asyncio.create_task(self._read(link, context)),
            asyncio.create_task(link.closed.wait()),
        ]
        try:
            await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if not link.why:
                link.close("the connection broke", link.reason)
            raise
        finally:
            for part in parts:
                part.cancel()
            self._detach(link)
            await asyncio.gather(*parts, return_exceptions=True)
        return link

    async def _read(self, link: WorkerLink, context: Any) -> None:
        while (message := await read(context)) is not None:
            if link.ended:  # a newer connection of the worker has taken its place
                return
            try:
                changed = link.apply(message)
                if message.usage or message.elsewhere or message.HasField("served"):
                    await self._apply_reports(link, message)
            except ValueError as error:  # the worker's fault, so only its link ends
                self.costs.charge(link.identity.model, FAULT)
                link.close(f"the worker sent what cannot be applied: {error}", "mad")
                return
            if link.cost:
                cost, link.cost = link.cost, 0.0
                await self.costs.spend(link.identity.model, cost)
            now = self._now()
            link.liveness.record_received(message.seq, message.acked_seq, now)
            if message.HasField("load"):
                link.liveness.record_load(link.load, now)
            if changed:
                self._listener.link_changed(link)

    async def _apply_reports(self, link: WorkerLink, message: pb.WorkerTurn) -> None:
        """Apply the reports of a message in slices, so that a long list does not block the event loop. All usage
        reports are applied, even if the link ends meanwhile: a worker that ends does not repeat them. Raises ValueError
        for reports beyond the bounds."""
        slices = link.apply_reports(message)
        if next(slices, None) is None:  # nearly always one slice
            return
        task = asyncio.create_task(_apply_rest(slices))
        self._applying.add(task)
        task.add_done_callback(self._applying.discard)
        await asyncio.shield(task)

    async def _write(self, link: WorkerLink, context: Any, welcome: pb.Welcome) -> None:
        await context.write(pb.GatewayTurn(welcome=welcome))
        while True:
            message = await link.box.next_message()
            link.liveness.record_sent(message.seq, self._now())
            await context.write(message)

    def apply_beat(self, link: WorkerLink, beat: pb.WorkerBeat) -> None:
        """Apply a heartbeat of this connection. Heartbeats of other connections are ignored."""
        if (link.identity.incarnation, link.epoch) == (beat.incarnation, beat.epoch) and not link.ended:
            link.apply_beat(beat, self._now())

    def _attach(self, link: WorkerLink) -> None:
        older = self._links.get(_key(link))
        if older is not None:
            older.close("the worker has reconnected")
            self._detach(older)
        self._links[_key(link)] = link
        log.info("worker.connected", **worker_fields(link.identity), model=link.identity.model, epoch=link.epoch)
        self._listener.link_up(link)
        self._on_change()

    def _detach(self, link: WorkerLink) -> None:
        if self._links.get(_key(link)) is not link:
            return
        del self._links[_key(link)]
        why = link.why or "the worker closed the link"
        engine = {"engine": link.engine_ended} if link.engine_ended else {}
        log.info("worker.disconnected", **worker_fields(link.identity), model=link.identity.model, reason=why, **engine)
        if link.engine_ended:
            self.lost.add(link.identity, link.engine_ended, time.time())
        link.end(why)
        self._listener.link_down(link, why)
        self._on_change()

    # ---- detection of lost workers

    def _now(self) -> float:
        """Return the waking time, which excludes pauses of this process."""
        return self._waking.at(time.monotonic())

    async def watch(self) -> None:
        """Check all links, and close the links of workers that are considered lost. Runs until cancelled."""
        while True:
            now = self._now()
            due = math.inf
            for link in list(self._links.values()):
                suspicion = link.liveness.suspicion(now)
                if suspicion is not None:
                    link.close(suspicion.why, suspicion.reason)
                    self._detach(link)
                else:
                    due = min(due, link.liveness.due)
            rest_s = max(self._rest_s(due - now), LEAST_REST_S)
            self._waking.rest(time.monotonic(), rest_s)
            await asyncio.sleep(rest_s)

    def _rest_s(self, left_s: float) -> float:
        """Return the seconds until the next check of the workers. `left_s`: seconds until the earliest time at which a
        worker may be suspected. The shorter this time is, the sooner the next check comes."""
        if left_s > max(CALM * self._timing.hang_s, 2 * CHECK_S):
            return CHECK_S
        return min(self._timing.hang_s / CHECKS, left_s)


async def _apply_rest(slices: Iterator[bool]) -> None:
    more = True
    while more:
        await asyncio.sleep(0)
        more = next(slices, False)


def _key(link: WorkerLink) -> tuple[str, str]:
    return link.identity.worker_id, link.identity.model
