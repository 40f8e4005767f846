"""The worker's side of its links: run Submits from all gateways on one engine and send back each step's outputs.

When a link ends, its requests are aborted in the engine and the gateway decides what happens to the calls. Requests
that another gateway may resume run on for a moment (detached_requests.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from cluster.api.demand import EngineCounts
from cluster.api.ports import AdapterEngine, Engine, EngineDead, KvEventSource
from cluster.api.types import EngineInfo, WorkerIdentity
from cluster.http2.client import ClientCall
from cluster.policy.routing.gateway_subset import GatewaySubset
from cluster.wire.addresses import GatewayAddresses
from cluster.wire.bundle import Bundle
from cluster.wire.credit import Capacity
from cluster.wire.dial import LinkEnded, Timing, read, wait_first
from cluster.wire.ended_requests import UsageKeeper
from cluster.wire.tls import TlsFiles
from cluster.worker.accounts.gpu_meter import GpuMeter
from cluster.worker.accounts.served_reports import ServedReports
from cluster.worker.accounts.usage import WorkerUsage
from cluster.worker.adapters.port import AdapterFiles
from cluster.worker.adapters.worker_adapters import WorkerAdapters
from cluster.worker.drain_state import Drains, DrainStates
from cluster.worker.engine_runner import EngineRunner
from cluster.worker.gateway_messages import GatewayMessages
from cluster.worker.kv_events.reports import KvReports
from cluster.worker.link import Link, LinkOpener
from cluster.worker.link_credit import LinkCredit
from cluster.worker.parsing.port import OutputParsers
from cluster.worker.rendering.prompt_renderer import PromptRenderer
from cluster.worker.renders import Renders
from cluster.worker.running_requests import RunningRequests
from cluster.worker.submits import Submits

log = structlog.get_logger("worker")

REPORT_S = 0.1
GATEWAY_SILENT_S = 1.0
"""Seconds without a beat after which a gateway counts as lost, when one of its calls is resumed through another
gateway. A gateway sends ten beats a second."""
END_REASON_S = 0.5
"""Seconds that a worker with an ended engine waits for its gateways to read the reason and close their links.

If the worker closed a link first, the reset of the connection could arrive before the reason.
"""


@dataclass(frozen=True, slots=True)
class WorkerStatistics:
    """The counts of a worker session. `tokens`: number of tokens of the running requests, with their prompts.
    `promised`: capacity that is granted to all links together."""

    links: int
    running: int
    tokens: int
    steps: int
    promised: Capacity
    unacked_usage: int = 0
    dropped_usage: int = 0
    detached: int = 0


class WorkerSession:
    """A session that serves one started engine to the gateways in `gateways` and to their siblings (other gateway
    processes on the same host). If there are many gateways, the session serves only those that `subset` chooses.

    `gateways` are `host:port` addresses or `srv://` names. The session lasts until it is closed.
    """

    def __init__(
        self,
        *,
        identity: WorkerIdentity,
        engine: Engine,
        info: EngineInfo,
        bundle: Bundle,
        gateways: Sequence[str],
        tls: TlsFiles | None = None,
        timing: Timing | None = None,
        outbox_tokens: int = 65_536,
        gpus: float = 0.0,
        gpu: str = "",
        keeper: UsageKeeper | None = None,
        idle_report_s: float = 60.0,
        parser: OutputParsers | None = None,
        kv_events: KvEventSource | None = None,
        renderer: PromptRenderer | None = None,
        subset: GatewaySubset | None = None,
        adapter_engine: AdapterEngine | None = None,
        adapter_files: AdapterFiles | None = None,
        engine_counts: Callable[[], EngineCounts] = EngineCounts,
    ) -> None:
        """Create a session; `run` serves the engine.

        `outbox_tokens`: number of token ids that may wait for one gateway before its link is closed.
        `gpus`, `gpu`: number and type of the replica's GPUs, for the ledger.
        `idle_report_s`: seconds between two reports of the idle time of the GPUs.
        `parser`: parser of outputs; None for a worker without parsers.
        `kv_events`: events of the engine's prefix cache; None for an engine without events.
        `renderer`: renderer of chats; None for a worker whose gateways render them.
        `subset`: rule for the choice of gateways; None for all gateways.
        `adapter_engine`, `adapter_files`: loader and store of adapters; None for an engine that takes none.
        `engine_counts` returns the engine's own counts.
        """
        self._engine = engine
        self._gateways = GatewayAddresses(gateways, choose=tuple if subset is None else subset.of)
        self._timing = timing or Timing()
        self._opener = LinkOpener(identity, engine, info, tls, self._timing, outbox_tokens, self._gateways)
        self._links: dict[int, Link] = {}
        meter = GpuMeter(gpus, info.max_num_batched_tokens, time.monotonic())
        self._usage = WorkerUsage(
            identity.incarnation, keeper or UsageKeeper(), meter, gpu, idle_report_s, lambda: self._requests.shares()
        )
        self._served = ServedReports()
        self._kv_reports = KvReports(kv_events, info.block_size)
        self._runner = EngineRunner(engine, parser, engine_counts)
        self._renders = Renders(renderer)
        self._adapters = WorkerAdapters(
            info, adapter_engine, adapter_files, self._runner.report_dead, version=identity.version
        )
        self._requests = RunningRequests(
            info,
            meter,
            self._served,
            self._usage,
            self._is_gateway_lost,
            self._runner.parser.close,
            self._adapters.loads.release,
        )
        self._drain_state = DrainStates()
        self._drains = Drains(self._drain_state, self._requests.idle, self._usage.flush)
        self._credit = LinkCredit(self._requests.capacity, self._requests.count_cached, self._drain_state)
        self._messages = GatewayMessages(
            identity=identity,
            bundle=bundle,
            credit=self._credit,
            usage=self._usage,
            served=self._served,
            adapters=self._adapters,
            submits=Submits(self._runner, self._requests, self._served, self._credit, self._adapters.loads),
            renders=self._renders,
            drains=self._drains,
        )
        self._closed = asyncio.Event()
        self._engine_ended = ""
        self._unlinked = asyncio.Event()

    def statistics(self) -> WorkerStatistics:
        """Return a snapshot of the worker's counts."""
        kept = self._usage.statistics()
        return WorkerStatistics(
            len(self._links),
            self._requests.running,
            self._requests.tokens,
            self._runner.steps,
            self._credit.promised(),
            kept.kept,
            kept.dropped,
            len(self._requests.detached),
        )

    async def run(self) -> None:
        """Serve until `close`. Raises EngineDead once the engine is lost, after every link is closed."""
        work: list[asyncio.Task[Any]] = [
            asyncio.create_task(self._runner.wait_dead()),
            asyncio.create_task(self._runner.run(self._requests.outputs, self._credit)),
            asyncio.create_task(self._runner.run_parsed(self._requests.outputs, self._credit)),
            asyncio.create_task(self._runner.parser.run()),
            asyncio.create_task(self._closed.wait() if (own := self._renders.renderer) is None else own.run()),
            asyncio.create_task(self._closed.wait()),
            asyncio.create_task(self._gateways.dial(self._serve_gateway, self._timing)),
            asyncio.create_task(self._usage.run()),
            asyncio.create_task(self._report_served()),
            asyncio.create_task(self._kv_reports.run()),
            asyncio.create_task(self._adapters.run()),
        ]
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            failures = [part.exception() for part in done if not part.cancelled()]
            await self._report_end(next((str(error) for error in failures if isinstance(error, EngineDead)), ""))
            for part in done:
                part.result()
        finally:
            for part in work:
                part.cancel()
            self._drains.cancel()
            await asyncio.gather(*work, self._runner.finish(), return_exceptions=True)
            with contextlib.suppress(EngineDead):
                await self._engine.abort(self._requests.detached.expired(math.inf))

    async def drain(self, timeout_s: float) -> bool:
        """Take no new work and wait for the running requests, since the process is about to end.

        Returns False if some requests still run after `timeout_s`.
        """
        return await self._drains.drain(timeout_s, leaving=True)

    async def close(self, engine_ended: str = "") -> None:
        """End every link, so that `run` returns. `engine_ended`: why the engine has ended, sent to the gateways."""
        self._engine_ended = self._engine_ended or engine_ended
        self._closed.set()

    async def _report_end(self, why: str) -> None:
        """If the engine has ended, send every gateway the reason and wait for the gateways to close their links."""
        self._engine_ended = self._engine_ended or why
        if not self._engine_ended or not self._links:
            return
        for link in self._links.values():
            link.outbox.engine_ended(self._engine_ended)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_REASON_S):
                await self._unlinked.wait()

    async def _report_served(self) -> None:
        """Report served tokens to every gateway and abort expired detached requests, every REPORT_S seconds."""
        while True:
            await asyncio.sleep(REPORT_S)
            self._served.report(self._requests.output_tokens())
            if expired := self._requests.detached.expired(time.monotonic()):
                log.info("worker.requests_dropped", requests=len(expired))
                await self._runner.abort(expired)
                self._credit.regrant()

    # ---- one session with one gateway

    async def _serve_gateway(self, address: str) -> None:
        if self._engine_ended:
            raise LinkEnded("the engine has ended")
        async with self._opener.open(address) as (link, call, bulk):
            self._attach(link)
            parts = [
                asyncio.create_task(self._read(link, call)),
                asyncio.create_task(_write(link, call)),
                asyncio.create_task(bulk),
                asyncio.create_task(self._watch_link(link)),
            ]
            try:
                await wait_first(parts)
            finally:
                await self._detach(link, parts)
                parts.clear()

    def _attach(self, link: Link) -> None:
        self._links[link.number] = link
        self._unlinked.clear()
        if link.accounts:
            self._usage.attach(link.number, link.outbox)
        self._credit.attach(link.credit_order, link.outbox)
        self._served.attach(link.number, link.incarnation, link.outbox)
        self._kv_reports.attach(link.number, link.outbox)
        self._adapters.attach(link.number, link.outbox)
        self._credit.regrant()
        self._drain_state.attach(link.outbox, time.monotonic())

    async def _detach(self, link: Link, parts: Sequence[asyncio.Task[None]]) -> None:
        """Release everything that a link holds: abort its requests in the engine and revoke its credit."""
        self._links.pop(link.number, None)
        if not self._links:
            self._unlinked.set()
        self._drain_state.detach(link.outbox)
        self._credit.detach(link.credit_order)
        self._served.detach(link.number)
        self._kv_reports.detach(link.number)
        self._adapters.detach(link.number)
        link.heartbeats.stop()
        to_abort = self._requests.detach_link(link, stays=self._drain_state.serves and not self._closed.is_set())
        self._usage.detach(link.number, link.outbox)
        for task in (*parts, *link.tasks):
            task.cancel()
        await asyncio.gather(*parts, *link.tasks, return_exceptions=True)
        if to_abort:
            with contextlib.suppress(EngineDead):
                await self._engine.abort(to_abort)
        self._credit.regrant()

    async def _watch_link(self, link: Link) -> None:
        """Check the link once per beat interval, and send the load if no step has sent it meanwhile.

        Raises LinkEnded if the gateway sends no beats, does not read, or does not acknowledge grants.
        """
        sent = 0
        while True:
            await asyncio.sleep(self._timing.beat_s)
            if (silent_s := link.heartbeats.silent_s) > self._timing.silence_s:
                raise LinkEnded(f"no beat from the gateway for {silent_s:.1f} s")
            if link.outbox.full:
                raise LinkEnded("the gateway does not read; its outbox is full")
            if self._credit.unacked_s(link.credit_order) > self._timing.silence_s:
                raise LinkEnded("the gateway sends beats but does not acknowledge its grants")
            link.outbox.work(self._runner.work(self._requests.outputs))
            if link.outbox.sent_seq == sent:  # otherwise a step has sent the load
                link.outbox.load(self._engine.load())
                link.outbox.flush()
            sent = link.outbox.sent_seq

    def _is_gateway_lost(self, incarnation: str) -> bool:
        """Return whether a gateway counts as lost: the worker has no link to it, or beats have stopped on all links."""
        links = (link for link in self._links.values() if link.incarnation == incarnation)
        return all(link.heartbeats.silent_s > GATEWAY_SILENT_S for link in links)

    async def _read(self, link: Link, call: ClientCall) -> None:
        while (message := await read(call)) is not None:
            try:
                await self._messages.apply(link, message)
            except (ValueError, LookupError) as error:  # the gateway's fault: end only its link
                raise LinkEnded(f"the gateway sent an invalid message: {error}") from error


async def _write(link: Link, call: ClientCall) -> None:
    while True:
        await call.write(await link.outbox.next_message())
