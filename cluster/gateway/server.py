"""A gateway process. The parts and listeners are built from the configuration, then started, drained and stopped."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from cluster.config.schema import Config
from cluster.gateway import optional_parts
from cluster.gateway.administration import Administration
from cluster.gateway.auth.authenticator import NoAuthentication
from cluster.gateway.auth.revocation import cut_revoked
from cluster.gateway.auth.tls import revoked_file
from cluster.gateway.call_service import CallService
from cluster.gateway.calls.records.access_log import AccessLog
from cluster.gateway.config_state import ConfigState
from cluster.gateway.console.overview.live import LiveOverview
from cluster.gateway.deferred_imports import import_later
from cluster.gateway.dispatch import Dispatch
from cluster.gateway.foundation import Foundation
from cluster.gateway.gauges import GatewayGauges
from cluster.gateway.links.hub import Hub
from cluster.gateway.models.directory import ModelDirectory
from cluster.gateway.ports import GatewayPorts
from cluster.gateway.probes import ModelHealth
from cluster.gateway.problems import ProblemFinder
from cluster.gateway.quotas.reservations import QuotaReservations
from cluster.gateway.scheduling.scheduler import Scheduler
from cluster.gateway.scheduling.worker_events import WorkerEvents
from cluster.observe.metrics import Histogram, Metrics
from cluster.policy.limits.request_bytes import ByteBounds, RequestBytes
from cluster.process import interpreter, memory
from cluster.process.private_files import make_private_folder
from cluster.wire.certificate_expiry import CertificateExpiry
from cluster.wire.dial import Timing

if TYPE_CHECKING:
    from cluster.gateway.auth.tenants import TenantAuthenticator
    from cluster.gateway.console.app import ConsoleApp
    from cluster.gateway.guards.guards import Guards
    from cluster.gateway.quotas.budgets import BudgetWatch

log = structlog.get_logger("gateway")

LAG_S = 0.1
"""Interval in seconds at which the lag of the event loop is measured."""
SLOW_BODIES_S = 1.0
"""Interval in seconds of the search for request bodies that arrive too slowly."""
HAND_OVER = 0.5
"""Final fraction of the drain time, in which a stopping gateway hands resumable streams over to other gateways."""
FINAL_STATUS_S = 0.5
"""Seconds after the drain time in which calls that still run can send their final status."""


class Gateway:
    """A gateway process with all its parts. `start` binds the ports. `stop` drains running calls and closes the
    ports."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        timing: Timing | None = None,
        process: int = 0,
        probes: str = "",
        config_state: ConfigState | None = None,
        usage_store: optional_parts.UsageStore | None = None,
    ) -> None:
        """`folder`: the folder for tokenizer bundles, the last catalog and, with a section `auth` in the configuration,
        the snapshot of tenants and keys. `process`: the index of this process among `gateway.processes`. `probes`: an
        address for grpc.health.v1 without TLS, "" for no such listener. `config_state`: the validity of the file from
        which `config` was read. `usage_store`: where usage records are written; None for the ledger that the
        configuration names. Raises ValueError for an unusable secret file."""
        make_private_folder(folder)
        self.config = config
        self._config_state = config_state or ConfigState()
        self._probes = probes
        self.foundation = Foundation.build(config, folder, process)
        self.metrics: Metrics = self.foundation.metrics
        self.tenants: TenantAuthenticator | None = self.foundation.tenants

        # The scheduler and the links to the workers.
        self.health = ModelHealth()
        # With `auth` models have no status, because the health service requires no key and must not reveal models.
        on_models_changed = self.health.update if self.tenants is None else None
        self.dispatch = Dispatch(self.foundation, timing, usage_store, on_models_changed)
        self.scheduler: Scheduler = self.dispatch.scheduler
        self.worker_events: WorkerEvents = self.dispatch.worker_events
        self.hub: Hub = self.dispatch.hub
        self.directory: ModelDirectory = self.dispatch.directory

        # The service that all APIs call, with the limits and guards that it checks.
        self.reservations = QuotaReservations(
            self.foundation.limits,
            self.dispatch.charges.learnt,
            self.metrics,
            self.scheduler.cut,
            max_tenants=config.observe.max_tenant_series,
        )
        budgets = optional_parts.budgets(
            config, self.tenants, self.metrics, self.foundation.process, self.foundation.limits.spent
        )
        self._budgets: BudgetWatch | None = budgets
        self._guards: Guards | None = optional_parts.guards(config, self.metrics, self.tenants)
        self.service: CallService = self._call_service()

        # The problems, the admin API, the console and the servers at the ports.
        certificates = CertificateExpiry.of_gateway(config.gateway.tls, config.gateway.link_tls)
        self.problems = ProblemFinder(self.foundation, self.dispatch, self._config_state, certificates)
        self.request_bytes = RequestBytes(ByteBounds.for_messages(config.gateway.max_message_bytes), time.monotonic)
        self._administration = Administration(
            self.foundation,
            self.dispatch,
            self.service,
            self.request_bytes,
            self.reservations.utilization,
            lambda: () if budgets is None else budgets.uses,
            lambda: self.problems.current,
        )
        self.live: LiveOverview = self._administration.live
        self.console: ConsoleApp | None = self._administration.console
        self.ports = GatewayPorts(
            self.foundation, self.service, self.hub, self.health, self._administration, self.request_bytes
        )
        self._tasks: list[asyncio.Task[None]] = []

    def _call_service(self) -> CallService:
        foundation, settings, access_log = self.foundation, self.config.gateway, self.config.observe.access_log
        return CallService(
            self.directory,
            self.scheduler,
            self.reservations,
            self.metrics,
            authenticator=self.tenants if self.tenants is not None else NoAuthentication(),
            guards=self._guards,
            max_attempts=settings.resume.max_attempts,
            max_silent_losses=settings.resume.max_silent_losses,
            resumes=self.dispatch.resumes,
            prompts=None if self.tenants is None else self.tenants.prompts,
            access_log=AccessLog(access_log.sample_ratio, access_log.max_lines_per_s, time.monotonic),
            tracer=optional_parts.tracer(self.config, foundation.span_export, foundation.gateway_id),
        )

    @property
    def endpoints(self) -> dict[str, str]:
        """Bound addresses, by the name of the listener."""
        return self.ports.listeners.endpoints

    # ---- start and stop

    async def start(self, link: socket.socket | None = None) -> None:
        """Bind all listeners. `link`: the listening socket from bind_link, at which workers may already be waiting.

        Raises RuntimeError when an address cannot be bound."""
        settings, foundation, accounting = self.config.gateway, self.foundation, self.dispatch.accounting
        if name := settings.open_port():
            raise RuntimeError(
                f"gateway.listen.{name}: port 0 with processes: {settings.processes}: each process would pick another; "
                "name a port (`headrace up` picks them for all)"
            )
        if foundation.tenants is not None:
            await foundation.tenants.start()
        if accounting is not None:
            accounting.start()
        if foundation.shared_limits is not None:
            await foundation.shared_limits.store.start()
        if foundation.span_export is not None:
            foundation.span_export.start()
        await self.ports.open_internal(self._probes, link)
        self._start_tasks()
        await self.ports.open_clients()
        log.info("gateway.started", gateway=self.hub.gateway_id, **self.endpoints)

    def _start_tasks(self) -> None:
        settings = self.config.gateway
        gauges = GatewayGauges(
            self.hub,
            self.directory,
            self.scheduler,
            self.service,
            self.foundation.limits,
            self.reservations,
            self.dispatch.accounting,
            self._config_state,
            self.problems.certificates,
        )
        self.metrics.add_process_metrics()
        self.metrics.add_gauges(gauges.samples)
        self.metrics.add_gauges(self.problems.gauges)
        files = (revoked_file(settings.tls, "gateway.tls"), revoked_file(settings.link_tls, "gateway.link_tls"))
        lists = [file for file in files if file is not None]
        work = [
            self.live.run(),
            self.problems.run(),
            self._config_state.watch(),
            self.hub.workers.watch(),
            self.service.send_keepalives(settings.keepalive_s),
            self.reservations.watch(),
            self.scheduler.backlogs.watch(),
            self.scheduler.hedges.watch(),
            _measure_lag(self.metrics.histogram("event_loop_lag_seconds")),
            _end_slow_bodies(self.request_bytes),
            import_later(lambda: not self.service.busy, self.scheduler.worker_caches.needs_modules),
            memory.keep_returning_free_pages(lambda: not self.service.busy),
        ]
        if lists:
            work.append(cut_revoked(lists, lambda: list(self.ports.listeners.servers.values())))
        if self._budgets is not None:
            self.metrics.add_gauges(self._budgets.gauges)
            work.append(self._budgets.run())
        self._tasks += [asyncio.create_task(part) for part in work]

    async def stop(self, drain_s: float) -> None:
        """Refuse new calls, let running calls finish for `drain_s` seconds, then close everything.

        In the last part of the drain time, resumable streams are handed over to other gateways."""
        foundation, ports = self.foundation, self.ports
        self.service.close("stopping")
        if self.console is not None:
            await self.console.close()
        await self.health.servicer.enter_graceful_shutdown()
        ends = asyncio.get_running_loop().call_later(drain_s, self.service.end_all)
        self._tasks.append(asyncio.create_task(self._hand_over(drain_s)))
        grace_s = drain_s + FINAL_STATUS_S
        await asyncio.gather(ports.http.stop(grace_s), ports.clients.stop(grace_s))
        ends.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.reservations.close()
        if self._guards is not None:
            await self._guards.close()
        if foundation.shared_limits is not None:
            await foundation.shared_limits.store.close()
        if self.dispatch.accounting is not None:
            await self.dispatch.accounting.stop()
        await ports.listeners.close("admin")
        self._administration.authorizer.close()
        await ports.links.stop(0)
        if foundation.tenants is not None:
            await foundation.tenants.stop()
        if foundation.span_export is not None:
            await asyncio.to_thread(foundation.span_export.stop)
        await ports.listeners.close("health", "metrics")

    async def _hand_over(self, drain_s: float) -> None:
        if self.hub.controller.gateways > self.config.gateway.processes:  # there are other gateways
            await asyncio.sleep(drain_s * (1 - HAND_OVER))
            await self.service.hand_over(self.service.clock() + drain_s * HAND_OVER)


async def _measure_lag(lag: Histogram) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + LAG_S
        await asyncio.sleep(LAG_S)
        lag.observe(max(loop.time() - due, 0.0))


async def _end_slow_bodies(request_bytes: RequestBytes) -> None:
    while True:
        await asyncio.sleep(SLOW_BODIES_S)
        for reservation in request_bytes.slow():
            reservation.too_slow()


async def run_gateway(
    config: Config,
    *,
    folder: Path,
    stop: asyncio.Event,
    ready: Callable[[dict[str, str]], None] = lambda endpoints: None,
    process: int = 0,
    probes: str = "",
    link: socket.socket | None = None,
    config_state: ConfigState | None = None,
) -> None:
    """Run a gateway until `stop` is set, then drain the gateway.

    `folder`: the folder for tokenizer bundles and the last catalog. `process`: the index of this process among
    `gateway.processes`. `probes`: an address for grpc.health.v1 without TLS, "" for no such listener.
    `config_state`: the validity of the file from which `config` was read. `ready`: called with the bound
    addresses, keyed by the names of the listeners. `link`: a bound socket for the links; None: the gateway
    binds its own.
    """
    interpreter.shorten_switch_interval()
    gateway = Gateway(config, folder, process=process, probes=probes, config_state=config_state)
    try:
        await gateway.start(link)
        ready(gateway.endpoints)
        await stop.wait()
    finally:
        await gateway.stop(config.gateway.drain_timeout_s)
        if link is not None:
            link.close()  # needed if the start failed before the socket was served
