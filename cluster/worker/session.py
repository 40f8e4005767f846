"""A session of a worker whose engine has started: it runs Submits of all gateways on the engine, and sends each step's
outputs back.
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
from cluster.policy.routing.gateway_subset import GatewaySubset
from cluster.wire.addresses import GatewayAddresses
from cluster.wire.bundle import Bundle
from cluster.wire.credit import Capacity
from cluster.wire.dial import Timing
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
from cluster.worker.link import LinkOpener
from cluster.worker.link_credit import LinkCredit
from cluster.worker.link_runner import GatewayReports, LinkRunner, OpenLinks
from cluster.worker.parsing.port import OutputParsers
from cluster.worker.rendering.prompt_renderer import PromptRenderer
from cluster.worker.renders import Renders
from cluster.worker.running_requests import RunningRequests
from cluster.worker.submits import Submits

log = structlog.get_logger("worker")

REPORT_S = 0.1


@dataclass(frozen=True, slots=True)
class WorkerStatistics:
    """The counts of a worker session.

    `tokens`: number of tokens of the running requests, including their prompts. `promised`: capacity that is granted to
    all links together.
    """

    links: int
    running: int
    tokens: int
    steps: int
    promised: Capacity
    unacked_usage: int = 0
    dropped_usage: int = 0
    detached: int = 0


class WorkerSession:
    """A session that serves one started engine to gateways, until the session is closed.

    The gateways are those in `gateways` (`host:port` addresses or `srv://` names), and their siblings: other gateway
    processes on the same host. If there are many gateways, `subset` chooses those that the session serves.
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
        `renderer`: renderer of chats; None if gateways render them.
        `subset`: rule for the choice of gateways; None for all gateways.
        `adapter_engine`, `adapter_files`: loader and store of adapters; None for an engine without adapters.
        `engine_counts`: returns the engine's own counts of preemptions and of the prefix cache.
        """
        self._engine = engine
        self._gateways = GatewayAddresses(gateways, choose=tuple if subset is None else subset.of)
        self._timing = timing or Timing()
        self._links = OpenLinks()
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
            self._links.is_gateway_lost,
            self._runner.parser.close,
            self._adapters.loads.release,
        )
        drain_state = DrainStates()
        self._drains = Drains(drain_state, self._requests.idle, self._usage.flush)
        self._credit = LinkCredit(self._requests.capacity, self._requests.count_cached, drain_state)
        messages = GatewayMessages(
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
        self._link_runner = LinkRunner(
            opener=LinkOpener(identity, engine, info, tls, self._timing, outbox_tokens, self._gateways),
            links=self._links,
            messages=messages,
            reports=GatewayReports(self._usage, self._served, self._kv_reports, self._adapters),
            credit=self._credit,
            drain_state=drain_state,
            requests=self._requests,
            runner=self._runner,
            closed=self._closed,
        )

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
        """Serve until `close`. If the engine dies, close every link and raise EngineDead."""
        work: list[asyncio.Task[Any]] = [
            asyncio.create_task(self._runner.wait_dead()),
            asyncio.create_task(self._runner.run(self._requests.outputs, self._credit)),
            asyncio.create_task(self._runner.run_parsed(self._requests.outputs, self._credit)),
            asyncio.create_task(self._runner.parser.run()),
            asyncio.create_task(self._closed.wait() if (own := self._renders.renderer) is None else own.run()),
            asyncio.create_task(self._closed.wait()),
            asyncio.create_task(self._gateways.dial(self._link_runner.run, self._timing)),
            asyncio.create_task(self._usage.run()),
            asyncio.create_task(self._report_served()),
            asyncio.create_task(self._kv_reports.run()),
            asyncio.create_task(self._adapters.run()),
        ]
        try:
            done, _ = await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            failures = [part.exception() for part in done if not part.cancelled()]
            self._links.record_engine_end(next((str(error) for error in failures if isinstance(error, EngineDead)), ""))
            await self._links.report_engine_end()
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
        """Take no new work, because the process is about to end, and wait for the running requests.

        Returns False if some requests still run after `timeout_s` seconds.
        """
        return await self._drains.drain(timeout_s, leaving=True)

    async def close(self, engine_ended: str = "") -> None:
        """End every link, so that `run` returns.

        `engine_ended`: why the engine has ended, which is sent to the gateways; "" if it has not ended.
        """
        self._links.record_engine_end(engine_ended)
        self._closed.set()

    async def _report_served(self) -> None:
        """Every REPORT_S seconds, report the served tokens to every gateway. Also abort the detached requests (requests
        whose gateway is gone) that have expired."""
        while True:
            await asyncio.sleep(REPORT_S)
            self._served.report(self._requests.output_tokens())
            if expired := self._requests.detached.expired(time.monotonic()):
                log.info("worker.requests_dropped", requests=len(expired))
                await self._runner.abort(expired)
                self._credit.regrant()
