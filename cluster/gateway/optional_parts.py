"""The parts of a gateway that depend on its configuration. Their modules are imported only if the configuration needs
them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from google.protobuf.message import Message

from cluster.admin.v1 import admin_pb2
from cluster.config.paths import cache_dir
from cluster.config.schema import Config
from cluster.observe.metrics import Metrics

if TYPE_CHECKING:
    from cluster.gateway.apis.admin.authorization import AdminAuthorizer, AdminMethod
    from cluster.gateway.apis.admin.routes import RememberedRoutes
    from cluster.gateway.apis.admin.siblings import Siblings
    from cluster.gateway.auth.tenants import TenantAuthenticator
    from cluster.gateway.call_service import CallService
    from cluster.gateway.calls.call import Call
    from cluster.gateway.console.app import ConsoleApp
    from cluster.gateway.console.overview.live import LiveOverview
    from cluster.gateway.guards.guards import Guards
    from cluster.gateway.links.hub import Hub
    from cluster.gateway.quotas.budgets import BudgetWatch, SumsCallback
    from cluster.gateway.quotas.valkey_limits import ValkeyLimits
    from cluster.gateway.resume_tokens.first_claims import FirstClaims
    from cluster.gateway.resume_tokens.resumption import ResumeService
    from cluster.gateway.tracing.tracer import Tracer
    from cluster.gateway.usage.accounting import Accounting
    from cluster.ledger.usage.records import UsageRecord
    from cluster.observe.span_export import SpanExport
    from cluster.policy.limits.request_bytes import RequestBytes


class UsageStore(NamedTuple):
    """A store of usage records. `insert`: writes records. `secrets`: keys that encrypt open records, which describe
    requests that still run. A worker keeps an encrypted copy of each."""

    secrets: Sequence[bytes]
    insert: Callable[[Sequence[UsageRecord]], int | None]


def tenant_authenticator(config: Config, folder: Path, metrics: Metrics, process: int) -> TenantAuthenticator | None:
    """Return the authenticator if the configuration has a section `auth`, else None."""
    if config.auth is None:
        return None
    from cluster.gateway.auth.tenants import TenantAuthenticator

    return TenantAuthenticator(config, folder, metrics, process)


def accounting(
    tenants: TenantAuthenticator | None, store: UsageStore | None, hub: Hub, folder: Path
) -> Accounting | None:
    """Return the usage accounting; None if `store` and `tenants` are both None. `store`: where records are written;
    None for the ledger of `tenants`."""
    if store is None and tenants is not None:
        store = UsageStore(tenants.secrets, tenants.ledger.usage.insert)
    if store is None:
        return None
    from cluster.gateway.usage.accounting import Accounting
    from cluster.ledger.usage.sealed_records import Sealer

    sealer = Sealer(store.secrets)
    return Accounting(
        incarnation=hub.incarnation, sealer=sealer, folder=folder, insert=store.insert, gateway=hub.gateway_id
    )


def budgets(
    config: Config, tenants: TenantAuthenticator | None, metrics: Metrics, process: int, on_sums: SumsCallback
) -> BudgetWatch | None:
    """Return the periodic check of all tenants' budgets; None if `tenants` is None.

    `process`: number of this process on its host. Only process 0 sends notices. `on_sums`: function that is called
    after each check, with the tokens that each tenant has used in the current day and in the current month. Raises
    ValueError for an unusable webhook secret file.
    """
    if tenants is None:
        return None
    from cluster.gateway.quotas.budgets import BudgetWatch
    from cluster.ledger.files import read_secrets

    webhook = config.observe.budget_webhook if process == 0 else None
    setting = "observe.budget_webhook.secret_file"
    return BudgetWatch(
        config.name,
        tenants.ledger,
        lambda: list(tenants.policies().values()),
        metrics,
        on_sums,
        webhook=webhook,
        secret=b"" if webhook is None else read_secrets(webhook.secret_file, setting)[0],
        max_tenants=config.observe.max_tenant_series,
    )


def guards(config: Config, metrics: Metrics, tenants: TenantAuthenticator | None) -> Guards | None:
    """Return the guards that the tenants' policies name; None if `tenants` is None. Raises ValueError for an unusable
    pattern file."""
    if tenants is None:
        return None
    from cluster.gateway.auth.tenants import guard_event
    from cluster.gateway.guards.guards import Guards

    guards = Guards(metrics, lambda decision: tenants.audit.write(guard_event(decision)))
    guards.check(config.policies())
    return guards


def span_export(config: Config, metrics: Metrics) -> SpanExport | None:
    """Return the exporter of spans; None if the configuration has no `observe.tracing`. Raises ValueError for an
    unusable file."""
    tracing = config.observe.tracing
    if tracing is None:
        return None
    from cluster.observe.span_export import SpanExport

    return SpanExport(
        tracing.endpoint,
        lambda outcome, spans: metrics.count("spans_total", outcome, by=spans),
        ca_file=tracing.ca_file,
        headers_file=tracing.headers_file,
        max_queued=tracing.max_queued_spans,
    )


def tracer(config: Config, export: SpanExport | None, gateway_id: str) -> Tracer | None:
    """Return the tracer of calls; None if `export` is None."""
    tracing = config.observe.tracing
    if tracing is None or export is None:
        return None
    from cluster import __version__
    from cluster.gateway.tracing.tracer import Tracer
    from cluster.observe import semantic_conventions as names
    from cluster.process.place import node_name, pod_name

    resource = {
        names.SERVICE_NAME: names.GATEWAY_SERVICE,
        names.SERVICE_INSTANCE: gateway_id,
        names.SERVICE_VERSION: __version__,
        names.CLUSTER: config.name,
    }
    pod = pod_name()
    resource |= {names.POD: pod, names.NODE: node_name()} if pod else {names.HOST: node_name()}
    return Tracer(export.add, resource, tracing.sample_ratio, follow_caller=tracing.follow_caller)


def shared_limits(config: Config, gateway_id: str) -> ValkeyLimits | None:
    """Return the limits that all gateways share; None if the configuration names no store."""
    if not config.store.limits_url:
        return None
    from cluster.gateway.quotas.valkey_limits import ValkeyLimits

    return ValkeyLimits(config.store.limits_url, gateway_id)


def resume_service(
    config: Config,
    tenants: TenantAuthenticator | None,
    limits: ValkeyLimits | None,
    take_over: Callable[[Call, int], None],
    incarnation: str,
) -> ResumeService:
    """Return the service that resumes the streams of lost gateways. Without a section `auth` in the configuration, the
    secret and the claims are files in the cache folder, which all gateways of a host share."""
    from cluster.gateway.resume_tokens.first_claims import FileFirstClaims, LedgerFirstClaims, StoreFirstClaims
    from cluster.gateway.resume_tokens.resumption import ResumeService

    claims: FirstClaims
    if tenants is not None:
        claims = LedgerFirstClaims(tenants.ledger.resumed_segments.claim)
    else:
        claims = FileFirstClaims(cache_dir() / "resumed.db")
    if limits is not None:
        claims = StoreFirstClaims(limits.store.first, claims)
    secrets = _cached_secrets if tenants is None else lambda: tenants.secrets
    return ResumeService(secrets, claims, take_over, config.gateway.resume.token_expires_s, incarnation)


def console(
    config: Config,
    tenants: TenantAuthenticator | None,
    service: CallService,
    methods: Mapping[str, AdminMethod],
    authorizer: AdminAuthorizer,
    request_bytes: RequestBytes,
    metrics: Metrics,
    live: LiveOverview,
) -> ConsoleApp | None:
    """Return the console; None if the configuration switches it off. Raises ValueError for an unusable file."""
    if not config.gateway.console.enabled:
        return None
    from cluster.gateway.console.app import ConsoleParts, build_console
    from cluster.gateway.console.feed import FeedEndpoints

    parts = ConsoleParts(config, tenants, service, methods, authorizer, request_bytes, metrics, FeedEndpoints(live))
    return build_console(parts, _cached_secrets if tenants is None else lambda: tenants.secrets)


def _cached_secrets() -> Sequence[bytes]:
    """Return the secrets of a cluster whose configuration has no section `auth`. They are in a file in the cache
    folder; a missing file is created."""
    from cluster.ledger.files import make_secret, read_secrets

    path = cache_dir() / "cluster-secret"
    if not path.exists():
        make_secret(path)
    return read_secrets(path, "auth.cluster_secret_file")


def siblings(
    config: Config,
    process: int,
    tenants: TenantAuthenticator | None,
    abort: Callable[[str, str], list[str]],
    remembered: RememberedRoutes,
) -> Siblings | None:
    """Return the client of the other gateway processes of this host; None if the host has a single process. The client
    aborts calls in the other processes and looks up the routes of their calls. It is needed because only process 0 has
    an admin port. `abort`: ends calls of this process (CallService.abort). `remembered`: the routes of this process,
    which the other processes request."""
    if config.gateway.processes == 1:
        return None
    from cluster.gateway.apis.admin.siblings import Siblings

    def aborted(request: admin_pb2.AbortRequestRequest) -> admin_pb2.AbortRequestResponse:
        ended = abort(request.request_id, request.parent)
        return admin_pb2.AbortRequestResponse(aborted=len(ended), tenants=ended)

    answers: dict[str, Callable[[Any], Message]] = {"AbortRequest": aborted, "ExplainRequest": remembered.find}
    return Siblings(config.gateway, process, () if tenants is None else tenants.secrets, answers)
