"""A gateway process. The parts and listeners are built from the configuration, then started, drained and stopped."""

from __future__ import annotations

import asyncio
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import structlog

from cluster import http2
from cluster.config.schema import Config
from cluster.gateway import optional_parts
from cluster.gateway.apis.admin.authorization import AdminAuthorizer, AdminMethod
from cluster.gateway.apis.admin.fleet import CatalogAdmin, FleetAdmin
from cluster.gateway.apis.admin.forwarding import ForwardedVerbs
from cluster.gateway.apis.admin.methods import admin_methods
from cluster.gateway.apis.admin.routes import RouteExplainer
from cluster.gateway.apis.grpc.inference import SERVICE
from cluster.gateway.apis.http.body import RequestBodies
from cluster.gateway.apis.http.server import HttpServer
from cluster.gateway.apis.http_application import http_application
from cluster.gateway.auth.authenticator import NoAuthentication
from cluster.gateway.auth.revocation import cut_revoked
from cluster.gateway.auth.tls import NewestContext, revoked_file
from cluster.gateway.call_service import CallService
from cluster.gateway.calls.records.access_log import AccessLog
from cluster.gateway.config_state import ConfigState
from cluster.gateway.console.build import Sources, live_overview
from cluster.gateway.deferred_imports import import_later
from cluster.gateway.gauges import GatewayGauges
from cluster.gateway.links.hub import Hub, hub_server
from cluster.gateway.listeners import Listeners, admin_server, client_server, ledger_services
from cluster.gateway.metrics_page import MetricsPage
from cluster.gateway.models.directory import ModelDirectory
from cluster.gateway.probes import SERVING, ModelHealth, probe_server
from cluster.gateway.quotas.local_limits import LocalLimits
from cluster.gateway.quotas.reservations import QuotaReservations
from cluster.gateway.scheduling.scheduler import Scheduler
from cluster.gateway.scheduling.service_charges import ServiceCharges
from cluster.gateway.scheduling.worker_events import WorkerEvents
from cluster.observe.metrics import Histogram, Metrics
from cluster.policy.fairness.waiting_room import Order, WaitingRoom
from cluster.policy.limits.limits import Limiter
from cluster.policy.limits.request_bytes import ByteBounds, RequestBytes
from cluster.process import interpreter, memory
from cluster.process.place import pod_name
from cluster.process.private_files import make_private_folder
from cluster.wire.certificate_expiry import CertificateExpiry
from cluster.wire.dial import Timing

log = structlog.get_logger("gateway")

LAG_S = 0.1
"""Interval in seconds at which the lag of the event loop is measured."""
SLOW_BODIES_S = 1.0
"""Interval in seconds of the search for request bodies that arrive too slowly."""
HAND_OVER = 0.5
"""Last fraction of the drain time, in which a stopping gateway hands resumable streams over to other gateways."""
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
        """`folder`: the folder for tokenizer bundles, the last catalog and, with `auth`, the snapshot of tenants and
        keys. `process`: the index of this process among `gateway.processes`. `probes`: an address for grpc.health.v1
        without TLS, "" for no such listener. `config_state`: the validity of the file from which `config` was read.
        `usage_store`: used instead of the ledger of `auth`. Raises ValueError for an unusable secret file."""
        make_private_folder(folder)
        self.config = config
        self._config_state = config_state or ConfigState()
        self._probes = probes
        self._process = process
        settings, observe = config.gateway, config.observe
        self.metrics = Metrics(config.name, config.observe.max_tenant_series)
        self.tenants = optional_parts.tenant_authenticator(config, folder, self.metrics, process)
        charges = ServiceCharges({entry.name: entry.rank for entry in config.classes}, self.metrics)
        self.scheduler = Scheduler(
            self,
            self._waiting_room(charges, charges.fair.order),
            charges,
            self.metrics,
            resume_wait_s=settings.resume.max_wait_s,
            max_silent_losses=settings.resume.max_silent_losses,
            render_room_of=partial(self._waiting_room, charges),
            routing=config.routing.settings(),
            hedging_share=config.routing.hedging.share,
        )
        self.worker_events = WorkerEvents(self.scheduler, self.metrics)
        self.hub = Hub(
            f"{pod_name() or config.name}-{uuid.uuid4().hex[:6]}",
            self.worker_events,
            timing,
            settings.siblings(process),
            settings.link_tls is not None,
            folder,
        )
        self.directory = ModelDirectory(folder, self.hub.bundles.fetch)
        self.accounting = optional_parts.accounting(self.tenants, usage_store, self.hub, folder / "usage")
        self._shared_limits = optional_parts.shared_limits(config, self.hub.gateway_id)
        self._limits = self._shared_limits or LocalLimits(Limiter())
        self.reservations = QuotaReservations(
            self._limits, charges.learnt, self.metrics, self.scheduler.cut, max_tenants=config.observe.max_tenant_series
        )
        self.guards = optional_parts.guards(config, self.metrics, self.tenants)
        self._resumes = optional_parts.resume_service(
            config, self.tenants, self._shared_limits, self.scheduler.take_over, self.hub.incarnation
        )
        self._span_export = optional_parts.span_export(config, self.metrics)
        self.service = CallService(
            self.directory,
            self.scheduler,
            self.reservations,
            self.metrics,
            authenticator=self.tenants if self.tenants is not None else NoAuthentication(),
            guards=self.guards,
            max_attempts=settings.resume.max_attempts,
            max_silent_losses=settings.resume.max_silent_losses,
            resumes=self._resumes,
            prompts=None if self.tenants is None else self.tenants.prompts,
            access_log=AccessLog(observe.access_log.sample_ratio, observe.access_log.max_lines_per_s, time.monotonic),
            tracer=optional_parts.tracer(config, self._span_export, self.hub.gateway_id),
        )
        self.listeners = Listeners()
        admission = self.listeners.admission
        self._request_bytes = RequestBytes(ByteBounds.for_messages(settings.max_message_bytes), time.monotonic)
        self.health = ModelHealth()
        self.clients = client_server(
            settings, self.service, self.health.servicer, admission(http2.Port.CLIENT), self._request_bytes
        )
        bodies = RequestBodies(settings.max_message_bytes, self._request_bytes)
        self.link_server = hub_server(self.hub, admission(http2.Port.LINK))
        self._explainer = RouteExplainer(self.scheduler.routes.history, self.hub.gateway_id)
        self._siblings = optional_parts.siblings(config, process, self.tenants, self.service.abort, self._explainer)
        self.scheduler.backlogs.gateways = lambda: self.hub.controller.gateways
        if self._siblings is not None:
            self.link_server.add_generic_rpc_handlers((self._siblings.handler(),))
        self._admin_authorizer = AdminAuthorizer(self.tenants)
        self._budgets = None if self.tenants is None else self.tenants.budgets(self._limits.spent)
        self.live = live_overview(
            Sources(
                config,
                process,
                self.hub,
                self.worker_events,
                self.directory,
                self.scheduler,
                self.service,
                self.metrics,
                self.tenants,
                self.accounting,
                self.reservations.utilization,
                lambda: () if self._budgets is None else self._budgets.uses,
                self._siblings,
            )
        )
        """What the console shows of the cluster."""
        self._methods = self._admin_methods()
        self.console = optional_parts.console(
            config,
            self.tenants,
            self.service,
            self._methods,
            self._admin_authorizer,
            self._request_bytes,
            self.metrics,
            self.live,
        )
        more = {} if self.console is None else self.console.endpoints()
        self.http = HttpServer(http_application(self.service, bodies, more), admission(http2.Port.CLIENT))
        self._tasks: list[asyncio.Task[None]] = []

    def _waiting_room(self, charges: ServiceCharges, order_of: Callable[[str], Order]) -> WaitingRoom:
        queue = self.config.gateway.queue
        return WaitingRoom(
            max_requests=queue.max_requests,
            max_tokens=queue.max_tokens,
            max_wait_s=queue.max_wait_s,
            order_of=order_of,
            weight_of=charges.weight_of,
            tenant_max_requests=queue.tenant_max_requests,
            tenant_max_tokens=queue.tenant_max_tokens,
            longer_s=lambda model: self.directory.starts_in_s(model),
        )

    @property
    def endpoints(self) -> dict[str, str]:
        """Bound addresses, by the name of the listener."""
        return self.listeners.endpoints

    # ---- scheduling.scheduler.SchedulerHost

    def model_unserved(self) -> None:
        """Report the demand to the controller now, because a call waits for a model that no worker serves."""
        self.hub.controller.report_now()

    def state_changed(self) -> None:
        """Update the health service.

        With `auth` models have no status, because the health service requires no key and must not reveal models."""
        if self._tasks and self.tenants is None:
            self.health.update(self.directory.models)

    def claimed_calls(self, model: str) -> Sequence[tuple[str, int]]:
        """Return the ids of a model's calls that were resumed at this gateway, each with its generation."""
        return self._resumes.taken_over(model)

    # ---- start and stop

    async def start(self, link: socket.socket | None = None) -> None:
        """Bind all listeners. `link`: the listening socket from bind_link, at which workers may already be waiting.

        Raises RuntimeError when an address cannot be bound."""
        settings, listeners = self.config.gateway, self.listeners
        listen = settings.listen.of(self._process)
        if name := settings.open_port():
            raise RuntimeError(
                f"gateway.listen.{name}: port 0 with processes: {settings.processes}: each process would pick another; "
                "name a port (`headrace up` picks them for all)"
            )
        if self.tenants is not None:
            await self.tenants.start()
        if self.accounting is not None:
            self.accounting.start()
        if self._shared_limits is not None:
            await self._shared_limits.store.start()
        if self._span_export is not None:
            self._span_export.start()
        if self._probes:
            probes = probe_server(self.health.servicer, listeners.admission(http2.Port.HEALTH))
            await listeners.open("health", self._probes, probes)
        files, processes = settings.link_tls, settings.processes
        link_tls = None if files is None else NewestContext.of_link(files)
        await listeners.open("link", listen.link, self.link_server, link_tls, listener=link)
        if not self._process:
            admin = admin_server(self._admin_authorizer, self._methods, listeners.admission(http2.Port.ADMIN))
            await listeners.open("admin", listen.admin, admin, self._tls("h2"))
        metrics = HttpServer(MetricsPage(self.metrics), listeners.admission(http2.Port.METRICS))
        await listeners.open("metrics", listen.metrics, metrics)
        self._start_tasks()
        await listeners.open("grpc", listen.grpc, self.clients, self._tls("h2"), shared=processes > 1)
        await listeners.open("http", listen.http, self.http, self._tls("http/1.1"), shared=processes > 1)
        await self.health.servicer.set("", SERVING)
        await self.health.servicer.set(SERVICE, SERVING)
        log.info("gateway.started", gateway=self.hub.gateway_id, **self.endpoints)

    def _tls(self, protocol: str) -> NewestContext | None:
        files = self.config.gateway.tls
        return None if files is None else NewestContext.of(files, protocol)

    def _admin_methods(self) -> Mapping[str, AdminMethod]:
        """Return the admin methods. Every process has them, for the console; only process 0 has the admin port."""
        authorizer = self._admin_authorizer
        services: dict[str, object] = {
            "Fleet": FleetAdmin(self.hub, self.service, authorizer, self._explainer, self.live, self._siblings),
            "Catalog": CatalogAdmin(self.hub, self.directory, self.scheduler),
            **ledger_services(self.config, self.tenants, authorizer, self.directory),
        }
        return admin_methods(services, ForwardedVerbs(self.hub, authorizer))

    def _start_tasks(self) -> None:
        settings = self.config.gateway
        gauges = GatewayGauges(
            self.hub,
            self.directory,
            self.scheduler,
            self.service,
            self._limits,
            self.reservations,
            self.accounting,
            self._config_state,
            CertificateExpiry.of_gateway(settings.tls, settings.link_tls),
        )
        self.metrics.add_process_metrics()
        self.metrics.add_gauges(gauges.samples)
        files = (revoked_file(settings.tls, "gateway.tls"), revoked_file(settings.link_tls, "gateway.link_tls"))
        lists = [file for file in files if file is not None]
        work = [
            self.live.run(),
            self._config_state.watch(),
            self.hub.workers.watch(),
            self.service.send_keepalives(settings.keepalive_s),
            self.reservations.watch(),
            self.scheduler.backlogs.watch(),
            self.scheduler.hedges.watch(),
            _measure_lag(self.metrics.histogram("event_loop_lag_seconds")),
            _end_slow_bodies(self._request_bytes),
            import_later(lambda: not self.service.busy, self.scheduler.worker_caches.needs_modules),
            memory.keep_returning_free_pages(lambda: not self.service.busy),
        ]
        if lists:
            work.append(cut_revoked(lists, lambda: list(self.listeners.servers.values())))
        if self._budgets is not None:
            self.metrics.add_gauges(self._budgets.gauges)
            work.append(self._budgets.run())
        self._tasks = [asyncio.create_task(part) for part in work]

    async def stop(self, drain_s: float) -> None:
        """Refuse new calls, let running calls finish for `drain_s` seconds, then close everything.

        In the last part of the drain time, resumable streams are handed over to other gateways."""
        self.service.close("stopping")
        if self.console is not None:
            await self.console.close()
        await self.health.servicer.enter_graceful_shutdown()
        ends = asyncio.get_running_loop().call_later(drain_s, self.service.end_all)
        self._tasks.append(asyncio.create_task(self._hand_over(drain_s)))
        grace_s = drain_s + FINAL_STATUS_S
        await asyncio.gather(self.http.stop(grace_s), self.clients.stop(grace_s))
        ends.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.reservations.close()
        if self.guards is not None:
            await self.guards.close()
        if self._shared_limits is not None:
            await self._shared_limits.store.close()
        if self.accounting is not None:
            await self.accounting.stop()
        await self.listeners.close("admin")
        self._admin_authorizer.close()
        await self.link_server.stop(0)
        if self.tenants is not None:
            await self.tenants.stop()
        if self._span_export is not None:
            await asyncio.to_thread(self._span_export.stop)
        await self.listeners.close("health", "metrics")

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
    """Run a gateway until `stop` is set, then drain the gateway. `ready` is called with the bound endpoints by listener
    name.

    `config_state`: the validity of the file from which `config` was read."""
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
