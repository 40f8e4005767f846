"""A gateway process. The parts and listeners are built from the configuration, then started, drained and stopped."""

from __future__ import annotations

import asyncio
import platform
import socket
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from cluster import __version__, http2
from cluster.admin.v1 import admin_pb2, tenants_pb2, usage_pb2
from cluster.api.types import ModelState, WorkerIdentity
from cluster.config.schema import Config, cache_dir
from cluster.gateway.apis.admin.authorization import AdminAuthorizer
from cluster.gateway.apis.admin.fleet import CatalogAdmin, FleetAdmin, NoLedger
from cluster.gateway.apis.admin.forwarding import ForwardedVerbs
from cluster.gateway.apis.grpc.inference import SERVICE, InferenceApi
from cluster.gateway.apis.http.body import RequestBodies
from cluster.gateway.apis.http.server import HttpServer
from cluster.gateway.apis.openai.app import OpenAiApi
from cluster.gateway.auth.authenticator import NoAuthentication
from cluster.gateway.auth.revocation import RevocablePort, RevokedFile, cut_revoked
from cluster.gateway.auth.tls import NewestContext, revoked_file
from cluster.gateway.config_state import ConfigState
from cluster.gateway.deferred_imports import import_later
from cluster.gateway.links.hub import Hub, hub_server
from cluster.gateway.links.listener import bind_failure
from cluster.gateway.metrics_page import MetricsPage
from cluster.gateway.models import KnownModel, ModelDirectory
from cluster.gateway.probes import probe_server
from cluster.gateway.quotas.local_limits import LocalLimits
from cluster.gateway.quotas.reservations import QuotaReservations
from cluster.gateway.scheduling.scheduler import Scheduler
from cluster.gateway.scheduling.service_charges import ServiceCharges
from cluster.gateway.scheduling.worker_events import WorkerEvents
from cluster.gateway.service import CallService
from cluster.observe.metrics import Metrics, Sample
from cluster.policy.fairness.waiting_room import WaitingRoom
from cluster.policy.limits.limits import Limiter
from cluster.policy.limits.request_bytes import ByteBounds, RequestBytes
from cluster.process import interpreter, memory, ticks
from cluster.process.descriptors import raise_descriptor_limit
from cluster.process.place import pod_name
from cluster.process.private_files import make_private_folder
from cluster.wire.dial import Timing

if TYPE_CHECKING:
    from cluster.gateway.apis.admin.sibling_aborts import SiblingAborts
    from cluster.gateway.auth.tenants import TenantAuthenticator
    from cluster.gateway.guards.guards import Guards
    from cluster.gateway.quotas.valkey_limits import ValkeyLimits
    from cluster.gateway.resume_tokens.resumption import ResumeService
    from cluster.gateway.usage.accounting import Accounting
    from cluster.ledger.usage.records import UsageRecord

log = structlog.get_logger("gateway")

ADMIN_MESSAGE_BYTES, ADMIN_CALLS = 1 << 20, 256
ADMIN_BOUNDS = ByteBounds(connection=4 << 20, tenant=16 << 20, process=32 << 20)
LAG_S = 0.1
"""Interval in seconds at which the lag of the event loop is measured."""
SLOW_BODIES_S = 1.0
"""Interval in seconds of the search for request bodies that arrive too slowly."""
HAND_OVER = 0.5
"""Fraction of the drain time, at its end, in which a stopping gateway hands resumable streams over to the other
gateways, if there are any."""
FINAL_STATUS_S = 0.5
"""Seconds after the drain time in which calls that still run can send their final status."""


class Gateway:
    """A gateway process with all its parts. `start` binds the ports. `stop` drains running calls and closes the
    ports."""

    def __init__(
        self, config: Config, folder: Path, timing: Timing | None = None, process: int = 0, probes: str = ""
    ) -> None:
        """`folder`: the folder for tokenizer bundles, the last catalog and, with `auth`, the snapshot of tenants and
        keys. `process`: the index of this process among `gateway.processes`. `probes`: an address for grpc.health.v1
        without TLS, "" for no such listener. Raises ValueError for an unusable secret file."""
        make_private_folder(folder)
        self.config = config
        self.config_state = ConfigState()
        self._probes = probes
        self._probe_server: http2.Server | None = None
        self._process = process
        queue = config.gateway.queue
        self.metrics = Metrics(config.name, config.observe.max_tenant_series)
        self.tenants = _tenants(config, folder, self.metrics, process)
        charges = ServiceCharges({entry.name: entry.rank for entry in config.classes}, self.metrics)
        room = WaitingRoom(
            max_requests=queue.max_requests,
            max_tokens=queue.max_tokens,
            max_wait_s=queue.max_wait_s,
            order_of=charges.fair.order,
            weight_of=charges.weight_of,
            tenant_max_requests=queue.tenant_max_requests,
            tenant_max_tokens=queue.tenant_max_tokens,
            longer_s=self._starts_in_s,
        )
        resume = config.gateway.resume
        self.scheduler = Scheduler(
            self,
            room,
            charges,
            self.metrics,
            resume_wait_s=resume.max_wait_s,
            max_silent_losses=resume.max_silent_losses,
        )
        self.worker_events = WorkerEvents(self.scheduler, self.metrics)
        siblings = config.gateway.siblings(process)
        self.hub = Hub(
            f"{pod_name() or config.name}-{uuid.uuid4().hex[:6]}",
            self.worker_events,
            timing,
            siblings,
            config.gateway.link_tls is not None,
        )
        self.directory: ModelDirectory = ModelDirectory(folder, self.hub.bundles.fetch)
        authenticator = self.tenants if self.tenants is not None else NoAuthentication()
        self._shared_limits = _shared_limits(config, self.hub.gateway_id)
        self._limits = self._shared_limits or LocalLimits(Limiter())
        self.reservations = QuotaReservations(
            self._limits,
            charges.learnt,
            self.metrics,
            self.scheduler.cut,
            max_tenants=config.observe.max_tenant_series,
        )
        self.request_bytes = RequestBytes(ByteBounds.for_messages(config.gateway.max_message_bytes), time.monotonic)
        self.guards = _guards(config, self.metrics, self.tenants)
        self._resume_service = self._resumes()
        self.service = CallService(
            self.directory,
            self.scheduler,
            self.reservations,
            self.metrics,
            authenticator=authenticator,
            guards=self.guards,
            max_attempts=resume.max_attempts,
            max_silent_losses=resume.max_silent_losses,
            resumes=self._resume_service,
            prompts=None if self.tenants is None else self.tenants.prompts,
        )
        self.connections = http2.ConnectionTable.for_descriptors(raise_descriptor_limit())
        self._notices = http2.LimitedLog()
        openai = OpenAiApi(self.service, RequestBodies(config.gateway.max_message_bytes, self.request_bytes))
        self.http = HttpServer(openai.app(), self._admission(http2.Port.CLIENT))
        self._metrics_server = HttpServer(MetricsPage(self.metrics), self._admission(http2.Port.METRICS))
        self.endpoints: dict[str, str] = {}
        self._health = health.aio.HealthServicer()
        self._healthy: dict[str, int] = {}
        self._admin_authorizer = AdminAuthorizer(self.tenants)
        self._admin: http2.Server | None = None
        self._clients: http2.Server | None = None
        self._links = hub_server(self.hub, self._admission(http2.Port.LINK))
        self._siblings = self._sibling_aborts()
        self.accounting: Accounting | None = None
        self._folder = folder
        self._tasks: list[asyncio.Task[None]] = []
        self._lag = self.metrics.histogram("event_loop_lag_seconds")
        self._health_updates: set[asyncio.Task[None]] = set()

    def _admission(self, port: http2.Port) -> http2.ConnectionAdmission:
        return http2.ConnectionAdmission(self.connections.pools[port], self._notices)

    def _resumes(self) -> ResumeService:
        """Return the service that resumes the streams of lost gateways. Without `auth` the secret and the claims are
        files in the cache folder, which all gateways of a host share."""
        from cluster.gateway.resume_tokens.first_claims import (
            FileFirstClaims,
            FirstClaims,
            LedgerFirstClaims,
            StoreFirstClaims,
        )
        from cluster.gateway.resume_tokens.resumption import ResumeService

        tenants, shared = self.tenants, self._shared_limits
        claims: FirstClaims
        if tenants is not None:
            claims = LedgerFirstClaims(tenants.ledger.resumed_segments.claim)
        else:
            claims = FileFirstClaims(cache_dir() / "resumed.db")
        if shared is not None:
            claims = StoreFirstClaims(shared.store.first, claims)
        secrets = _cached_secrets if tenants is None else lambda: tenants.secrets
        expires_s = self.config.gateway.resume.token_expires_s
        return ResumeService(secrets, claims, self.scheduler.take_over, expires_s, self.hub.incarnation)

    # ---- scheduling.scheduler.SchedulerHost

    def model_unserved(self) -> None:
        """Report the demand to the controller now, because a call waits for a model that no worker serves."""
        self.hub.controller.report_now()

    def state_changed(self) -> None:
        """Update the health service."""
        if self._tasks:
            self._update_health()

    def claimed_calls(self, model: str) -> Sequence[tuple[str, int]]:
        """Return the ids of a model's calls that were resumed at this gateway, each with its generation."""
        return self._resume_service.taken_over(model)

    def _starts_in_s(self, model: str) -> float:
        return self.directory.starts_in_s(model)

    async def start(self, link: socket.socket | None = None) -> None:
        """Bind all listeners. `link`: the listening socket from bind_link, at which workers may already be waiting.

        Raises RuntimeError when an address cannot be bound."""
        gateway = self.config.gateway
        listen = gateway.listen.of(self._process)
        if name := gateway.open_port():
            raise RuntimeError(
                f"gateway.listen.{name}: port 0 with processes: {gateway.processes}: each process would pick another; "
                "name a port (`headrace up` picks them for all)"
            )
        if self.tenants is not None:
            await self.tenants.start()
            self.keep_accounts(self.tenants.secrets, self.tenants.ledger.usage.insert)
        if self._shared_limits is not None:
            await self._shared_limits.store.start()
        if self._probes:
            await self._bind("health", self._probes, self._serve_probes)
        await self._bind("link", listen.link, partial(self._serve_links, link))
        if not self._process:
            await self._bind("admin", listen.admin, self._serve_admin)
        await self._bind("metrics", listen.metrics, self._serve_metrics)
        self.metrics.add_gauges(self._gauges)
        self._tasks = [
            asyncio.create_task(self.hub.workers.watch()),
            asyncio.create_task(self.service.send_keepalives(gateway.keepalive_s)),
            asyncio.create_task(self.reservations.watch()),
            asyncio.create_task(self.scheduler.backlogs.watch()),
            asyncio.create_task(self._measure_lag()),
            asyncio.create_task(self._end_slow_bodies()),
            asyncio.create_task(import_later(lambda: not self.service.busy)),
            asyncio.create_task(memory.keep_returning_free_pages(lambda: not self.service.busy)),
        ]
        if lists := self._revoked_files():
            self._tasks.append(asyncio.create_task(cut_revoked(lists, self._tls_ports)))
        if self.tenants is not None:
            budgets = self.tenants.budgets(self._limits.spent)
            self.metrics.add_gauges(budgets.gauges)
            self._tasks.append(asyncio.create_task(budgets.run()))
        await self._bind("grpc", listen.grpc, self._serve_clients)
        await self._bind("http", listen.http, self._serve_http)
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        log.info("gateway_up", gateway=self.hub.gateway_id, **self.endpoints)

    def keep_accounts(self, secrets: Sequence[bytes], insert: Callable[[Sequence[UsageRecord]], None]) -> None:
        """Start to record usage. Must be called before any worker or caller connects."""
        from cluster.gateway.usage.accounting import Accounting
        from cluster.ledger.usage.sealed_records import Sealer

        accounting = Accounting(
            incarnation=self.hub.incarnation,
            sealer=Sealer(secrets),
            folder=self._folder / "usage",
            insert=insert,
            gateway=self.hub.gateway_id,
        )
        accounting.start()
        self.accounting = accounting

    async def _bind(self, name: str, address: str, serve: Callable[[str, int], Awaitable[int]]) -> None:
        host, port = address.rsplit(":", 1)
        try:
            self.endpoints[name] = f"{host}:{await serve(host.strip('[]'), int(port))}"
        except OSError as error:
            raise RuntimeError(bind_failure(name, address, error)) from None

    async def _serve_metrics(self, host: str, port: int) -> int:
        return await self._metrics_server.start(host, port)

    async def _serve_links(self, bound: socket.socket | None, host: str, port: int) -> int:
        files = self.config.gateway.link_tls
        tls = None if files is None else NewestContext.of_link(files)
        if bound is not None:
            return await self._links.serve(bound, tls)
        return await self._links.start(host, port, tls)

    async def _serve_admin(self, host: str, port: int) -> int:
        server = http2.Server(
            http2.ServerLimits(max_message_bytes=ADMIN_MESSAGE_BYTES, max_calls=ADMIN_CALLS),
            self._admission(http2.Port.ADMIN),
            self._admin_authorizer,
            RequestBytes(ADMIN_BOUNDS, time.monotonic),
        )
        services: dict[str, object] = {
            "Fleet": FleetAdmin(self.hub, self.service, self._admin_authorizer, self._siblings),
            "Catalog": CatalogAdmin(self.hub, self.directory, self.scheduler),
            **self._ledger_services(),
        }
        forwarded = ForwardedVerbs(self.hub, self._admin_authorizer)
        names = [reflection.SERVICE_NAME]
        for file in (admin_pb2.DESCRIPTOR, tenants_pb2.DESCRIPTOR, usage_pb2.DESCRIPTOR):
            server.add_generic_rpc_handlers(self._admin_authorizer.handlers(file, services, forwarded))
            names += [service.full_name for service in file.services_by_name.values()]
        reflections = reflection.aio.ReflectionServicer(names)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflections, server)  # type: ignore[no-untyped-call]
        self._admin = server
        return await server.start(host, port, self._tls("h2"))

    def _sibling_aborts(self) -> SiblingAborts | None:
        """Return the object by which the gateway processes of a host abort each other's calls, which is needed because
        only process 0 has an admin port. None with a single process."""
        if self.config.gateway.processes == 1:
            return None
        from cluster.gateway.apis.admin.sibling_aborts import SiblingAborts

        secrets = self.tenants.secrets if self.tenants is not None else ()
        siblings = SiblingAborts(self.config.gateway, self._process, secrets, self.service.abort)
        self._links.add_generic_rpc_handlers((siblings.handler(),))
        return siblings

    def _ledger_services(self) -> dict[str, object]:
        if self.tenants is None:
            return dict.fromkeys(("Tenants", "Keys", "Usage", "Audit"), NoLedger())
        from cluster.gateway.apis.admin.ledger import AuditAdmin, KeysAdmin, TenantsAdmin, TenantServices, UsageAdmin

        shared = TenantServices(self.config, self.tenants, self._admin_authorizer)
        kinds = {"Tenants": TenantsAdmin, "Keys": KeysAdmin, "Usage": UsageAdmin, "Audit": AuditAdmin}
        return {name: kind(shared) for name, kind in kinds.items()}

    async def _serve_clients(self, host: str, port: int) -> int:
        gateway = self.config.gateway
        limits = http2.ServerLimits(
            max_message_bytes=gateway.max_message_bytes,
            age_s=gateway.max_connection_age_s,
            age_grace_s=max(gateway.drain_timeout_s, 1.0),
        )
        inference = InferenceApi(self.service, gateway.max_connection_age_s * 0.9)
        server = http2.Server(limits, self._admission(http2.Port.CLIENT), inference, self.request_bytes)
        server.add_generic_rpc_handlers((inference.handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)  # type: ignore[arg-type]
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflections = reflection.aio.ReflectionServicer(names)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflections, server)  # type: ignore[no-untyped-call]
        bound = await server.start(host, port, self._tls("h2"), shared=self._shared)
        self._clients = server
        return bound

    async def _serve_probes(self, host: str, port: int) -> int:
        self._probe_server = probe_server(self._health, self._admission(http2.Port.HEALTH))
        return await self._probe_server.start(host, port)

    async def _serve_http(self, host: str, port: int) -> int:
        return await self.http.start(host, port, self._tls("http/1.1"), shared=self._shared)

    def _tls(self, protocol: str) -> NewestContext | None:
        tls = self.config.gateway.tls
        return None if tls is None else NewestContext.of(tls, protocol)

    def _revoked_files(self) -> list[RevokedFile]:
        gateway = self.config.gateway
        files = [revoked_file(gateway.tls, "gateway.tls"), revoked_file(gateway.link_tls, "gateway.link_tls")]
        return [file for file in files if file is not None]

    def _tls_ports(self) -> list[RevocablePort]:
        return [port for port in (self._links, self._clients, self._admin, self.http) if port is not None]

    @property
    def _shared(self) -> bool:
        """Whether other gateway processes also listen on the client ports."""
        return self.config.gateway.processes > 1

    async def stop(self, drain_s: float) -> None:
        """Refuse new calls, let running calls finish for `drain_s` seconds, then close everything.

        In the last part of the drain time, resumable streams are handed over to other gateways."""
        self.service.close("stopping")
        await self._health.enter_graceful_shutdown()
        ends = asyncio.get_running_loop().call_later(drain_s, self.service.end_all)
        self._tasks.append(asyncio.create_task(self._hand_over(drain_s)))
        grace_s = drain_s + FINAL_STATUS_S
        clients = [] if self._clients is None else [self._clients.stop(grace_s)]
        await asyncio.gather(self.http.stop(grace_s), *clients)
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
        if self._admin is not None:
            await self._admin.stop(0)
        self._admin_authorizer.close()
        await self._links.stop(0)
        if self.tenants is not None:
            await self.tenants.stop()
        if self._probe_server is not None:
            await self._probe_server.stop(0)
        await self._metrics_server.stop(0)

    async def _hand_over(self, drain_s: float) -> None:
        if self.hub.controller.gateways > self.config.gateway.processes:  # there are other gateways
            await asyncio.sleep(drain_s * (1 - HAND_OVER))
            await self.service.hand_over(self.service.clock() + drain_s * HAND_OVER)

    # ---- health and metrics

    def _update_health(self) -> None:
        """Set the grpc.health.v1 status for each model name and alias.

        With `auth` no status is set, because the health service requires no key and must not reveal models."""
        if self.tenants is not None:
            return
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        now = {
            name: serving if model.state is ModelState.READY else not_serving
            for model in self.directory.models
            for name in (model.name, *model.entry.aliases)
        }
        for name, status in {**dict.fromkeys(self._healthy, not_serving), **now}.items():
            if self._healthy.get(name) != status:
                self._healthy[name] = status
                task = asyncio.create_task(self._health.set(name, status))
                self._health_updates.add(task)
                task.add_done_callback(self._health_updates.discard)

    async def _measure_lag(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + ticks.seconds_to_tick(loop.time(), LAG_S)
            await asyncio.sleep(due - loop.time())
            self._lag.observe(max(loop.time() - due, 0.0))

    async def _end_slow_bodies(self) -> None:
        while True:
            await asyncio.sleep(SLOW_BODIES_S)
            for reservation in self.request_bytes.slow():
                reservation.too_slow()

    def _gauges(self) -> Iterator[Sample]:
        yield "build_info", (__version__, platform.python_version(), grpc.__version__), 1
        statistics = self.hub.statistics()
        yield "link_connected", ("worker",), statistics.workers
        yield "link_connected", ("controller",), statistics.controllers
        heard = self.hub.catalog_at
        if self.accounting is not None:
            ledger = self.accounting.statistics()
            yield "ledger_pending_records", (), ledger.pending
            yield (
                "ledger_lag_seconds",
                (),
                0 if ledger.oldest_at_s is None else max(time.time() - ledger.oldest_at_s, 0),
            )
        yield "catalog_age_seconds", (), -1 if heard is None else time.monotonic() - heard
        yield "config_valid", (), float(self.config_state.valid)
        yield "limits_degraded", (), float(self._limits.degraded)
        for tenant, limit, ratio in self.reservations.utilization():
            yield "limit_utilization_ratio", (tenant, limit), ratio
        spreads = self.scheduler.charges.spreads
        running = self.service.statistics()
        for model in self.directory.models:
            yield "fairness_gap_ratio", (model.name,), spreads.get(model.name, 0.0) / _turn_tokens(model)
            waiting, tokens = self.scheduler.queues.waiting(model.name)
            yield "requests_in_flight", (model.name,), running.get(model.name, 0)
            yield "queue_requests", (model.name,), waiting
            yield "queue_tokens", (model.name,), tokens
            yield "model_replicas", (model.name,), len(model.links)
            yield "model_replicas_desired", (model.name,), model.entry.replicas_desired
            for state in ModelState:
                yield "model_state", (model.name, state.value.lower()), float(model.state is state)
        for link in self.hub.links:
            labels, load = (link.identity.model, link.identity.worker_id), link.load
            yield "worker_up", labels, 1
            yield "worker_info", _info_labels(link.identity), 1
            yield "worker_running_requests", labels, load.running
            yield "worker_waiting_requests", labels, load.waiting
            yield "worker_kv_usage_ratio", labels, load.kv_usage
            yield "worker_step_seconds", labels, load.step_s
            yield (
                "engine_path_info",
                (link.identity.worker_id, link.info.engine_path, link.info.engine_path_reason),
                1,
            )


def _info_labels(identity: WorkerIdentity) -> tuple[str, ...]:
    return (identity.worker_id, identity.pod, identity.host or identity.node, identity.gpu)


def _tenants(config: Config, folder: Path, metrics: Metrics, process: int) -> TenantAuthenticator | None:
    """Return the authenticator for a configuration with `auth`, else None. The database and token modules are imported
    only if needed."""
    if config.auth is None:
        return None
    from cluster.gateway.auth.tenants import TenantAuthenticator

    return TenantAuthenticator(config, folder, metrics, process)


def _guards(config: Config, metrics: Metrics, tenants: TenantAuthenticator | None) -> Guards | None:
    """Return the guards that the tenants' policies name; None without tenants. Raises ValueError for an unusable
    pattern file."""
    if tenants is None:
        return None
    from cluster.gateway.auth.tenants import guard_event
    from cluster.gateway.guards.guards import Guards

    guards = Guards(metrics, lambda decision: tenants.audit.write(guard_event(decision)))
    guards.check(config.policies())
    return guards


def _shared_limits(config: Config, gateway: str) -> ValkeyLimits | None:
    """Return the limits that all gateways share; None if the configuration names no store. The client of the store is
    imported only if needed."""
    if not config.store.limits_url:
        return None
    from cluster.gateway.quotas.valkey_limits import ValkeyLimits

    return ValkeyLimits(config.store.limits_url, gateway)


def _cached_secrets() -> Sequence[bytes]:
    """Return the secrets of a cluster without `auth`, from a file in the cache folder. A missing file is created."""
    from cluster.ledger.files import make_secret, read_secrets

    path = cache_dir() / "cluster-secret"
    if not path.exists():
        make_secret(path)
    return read_secrets(path, "auth.cluster_secret_file")


def _turn_tokens(model: KnownModel) -> float:
    """Return U of docs/tenancy.md, in weighted tokens: the larger of the cost of the longest input and the cost of
    outputs that fill one worker's KV cache."""
    kv_tokens = max((link.info.kv_tokens for link in model.links.values()), default=0)
    return max(2.0 * kv_tokens, float(model.max_model_len), 1.0)


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
    gateway = Gateway(config, folder, process=process, probes=probes)
    gateway.config_state = config_state or gateway.config_state
    watching = asyncio.create_task(gateway.config_state.watch())
    try:
        await gateway.start(link)
        ready(gateway.endpoints)
        await stop.wait()
    finally:
        watching.cancel()
        await gateway.stop(config.gateway.drain_timeout_s)
        if link is not None:
            link.close()  # needed if the start failed before the socket was served
