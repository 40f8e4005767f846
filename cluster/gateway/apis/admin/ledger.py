"""The Tenants, Keys, Usage and Audit services of cluster.admin.v1. Imported only by a gateway with `auth`."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
from google.protobuf import json_format

from cluster.admin.v1 import tenants_pb2 as pb
from cluster.admin.v1 import usage_pb2
from cluster.api.outcomes import CallError, Outcome, Violation, invalid
from cluster.gateway.apis.admin import codec
from cluster.gateway.apis.admin.authorization import AdminAuthorizer, AdminCaller, details_of
from cluster.gateway.apis.admin.pages import next_token, page_size, parse_filter, position_of
from cluster.ledger.audit.audit import AuditEvent
from cluster.ledger.errors import LedgerError, StoreUnavailable
from cluster.ledger.rows import Prices, UsageQuery
from cluster.ledger.slo import SloObjective, SloObjectives
from cluster.ledger.tenants.service import DEFAULT_OVERLAP_S, Actor, LedgerTenantService
from cluster.ledger.usage.records import UsageRecord
from cluster.ledger.usage.reports import LedgerUsageReports
from cluster.policy.tenants.identity import may_manage_keys

if TYPE_CHECKING:
    from cluster.config.schema import Config
    from cluster.gateway.auth.tenants import TenantAuthenticator
    from cluster.gateway.models.known_model import KnownModel
    from cluster.ledger.rows import StoredTenant

log = structlog.get_logger("admin")

S = TypeVar("S")
T = TypeVar("T")
EXPORT_PAGE = 500
MAX_REQUEST_ID = 128
_FIELD = re.compile(r"[a-z][A-Za-z0-9_.\[\]]*")
_TENANT_FILTER = {"class": "class", "origin": "origin", "suspended": "suspended", "labels": "labels.x"}
_AUDIT_FILTER = {name: name for name in ("kind", "action", "actor", "object", "outcome")}


class TenantServices:
    """Runs ledger operations for a caller, and converts ledger errors to errors of the admin API."""

    def __init__(self, config: Config, tenants: TenantAuthenticator, authorizer: AdminAuthorizer) -> None:
        self._tenants = tenants
        self._authorizer = authorizer
        self._policy_of = config.tenant_defaults.policy
        self._classes = {priority_class.name for priority_class in config.classes}
        rates = Prices(config.cost.currency, dict(config.cost.gpu_hour)) if config.cost else None
        self._reports = LedgerUsageReports(tenants.ledger, rates=rates)

    async def run(self, caller: AdminCaller, act: Callable[[LedgerTenantService], T]) -> T:
        """Call `act` with a LedgerTenantService that records the caller as the actor, and return the result of `act`.
        `act` runs in a thread. Raises a CallError in place of each LedgerError of `act`."""
        by = Actor(caller.actor, caller.source, details_of(caller))
        service = LedgerTenantService(
            self._tenants.ledger,
            by,
            self._write,
            self._policy_of,
            clock=time.time,
            classes=self._classes,
            may_grant=partial(may_manage_keys, caller.principal),
        )
        return await self._in_thread(act, service)

    async def read(self, act: Callable[[LedgerUsageReports], T]) -> T:
        """Call `act` with the usage reports, and return the result of `act`. `act` runs in a thread. Raises a CallError
        in place of each LedgerError of `act`."""
        return await self._in_thread(act, self._reports)

    async def _in_thread(self, act: Callable[[S], T], service: S) -> T:
        try:
            return await self._authorizer.in_thread(act, service)
        except LedgerError as error:
            raise _as_call_error(error) from None

    def _write(self, event: AuditEvent) -> None:
        """Write an audit event before the request is answered. While the database is unreachable, the event stays in
        the local audit file. This gateway reads the tenants and keys again, since the verb may have changed them."""
        self._tenants.refresh()
        self._tenants.audit.write(event)
        if event.outcome != Outcome.STORE_UNAVAILABLE.value:
            self._tenants.audit.flush()


def _as_call_error(error: LedgerError) -> CallError:
    if isinstance(error, StoreUnavailable):  # the text holds the address of the database, which must not reach callers
        log.warning("ledger.unavailable", error=str(error))
        return CallError(error.outcome, "the ledger's database does not answer; retry shortly")
    field, colon, remedy = str(error).partition(": ")
    if error.outcome is Outcome.INVALID_FIELD and colon and _FIELD.fullmatch(field):
        return CallError(error.outcome, str(error), violations=[Violation(field, remedy)])
    return CallError(error.outcome, str(error))


class TenantsAdmin:
    """The Tenants service (tenants.proto). AdminAuthorizer has authorized each caller before a method runs."""

    def __init__(self, services: TenantServices) -> None:
        self._services = services

    async def Create(self, request: pb.CreateTenantRequest, caller: AdminCaller) -> pb.Tenant:
        """Create a tenant."""
        name = codec.tenant_name(request.tenant.name, "tenant.name")
        own = codec.own_fields(request.tenant, request.unset_mask.paths)
        options: dict[str, Any] = {"request_id": _request_id(request.request_id), "reason": request.reason}
        options["validate_only"] = request.validate_only
        return codec.tenant_pb(
            await self._services.run(caller, lambda service: service.create_tenant(name, own, **options))
        )

    async def Get(self, request: pb.GetTenantRequest, caller: AdminCaller) -> pb.Tenant:
        """Return a tenant."""
        name = codec.tenant_name(request.name, "name")
        return codec.tenant_pb(await self._services.run(caller, lambda service: service.get_tenant(name)))

    async def List(self, request: pb.ListTenantsRequest, caller: AdminCaller) -> pb.ListTenantsResponse:
        """List the tenants that the caller may see."""
        size, wanted = page_size(request.page_size), parse_filter(request.filter, _TENANT_FILTER)
        after = position_of(request.page_token, (str,), "tenants", request.filter)

        def read(service: LedgerTenantService) -> list[StoredTenant]:
            rows = [service.get_tenant(caller.scope)] if caller.scope else service.tenants(after[0] if after else "")
            return list(islice((stored for stored in rows if _matches(stored, wanted)), size + 1))

        tenants = await self._services.run(caller, read)
        more = next_token([tenants[size - 1].policy.name], "tenants", request.filter) if len(tenants) > size else ""
        return pb.ListTenantsResponse(tenants=map(codec.tenant_pb, tenants[:size]), next_page_token=more)

    async def Update(self, request: pb.UpdateTenantRequest, caller: AdminCaller) -> pb.Tenant:
        """Update a tenant: the fields that the mask names, or without a mask all fields that the request sets."""
        name = codec.tenant_name(request.tenant.name, "tenant.name")
        changes, whole = codec.changes(request.tenant, request.update_mask.paths)
        options: dict[str, Any] = {"whole": whole, "validate_only": request.validate_only, "reason": request.reason}
        return codec.tenant_pb(
            await self._services.run(caller, lambda service: service.update_tenant(name, changes, **options))
        )

    async def Delete(self, request: pb.DeleteTenantRequest, caller: AdminCaller) -> pb.DeleteTenantResponse:
        """Delete a tenant. With `erase`, all database rows with the tenant's name are deleted too."""
        name = codec.tenant_name(request.name, "name")
        options = {"erase": request.erase, "validate_only": request.validate_only}
        rows = await self._services.run(
            caller, lambda service: service.delete_tenant(name, reason=request.reason, **options)
        )
        return pb.DeleteTenantResponse(erased_rows=rows)

    async def Undelete(self, request: pb.UndeleteTenantRequest, caller: AdminCaller) -> pb.Tenant:
        """Bring a deleted tenant back."""
        name = codec.tenant_name(request.name, "name")
        back = await self._services.run(caller, lambda service: service.undelete_tenant(name, reason=request.reason))
        return codec.tenant_pb(back)

    async def Suspend(self, request: pb.SuspendTenantRequest, caller: AdminCaller) -> pb.Tenant:
        """Suspend a tenant."""
        return await self._suspend(request, True, caller)

    async def Resume(self, request: pb.ResumeTenantRequest, caller: AdminCaller) -> pb.Tenant:
        """End the suspension of a tenant."""
        return await self._suspend(request, False, caller)

    async def _suspend(
        self, request: pb.SuspendTenantRequest | pb.ResumeTenantRequest, suspended: bool, caller: AdminCaller
    ) -> pb.Tenant:
        name, reason = codec.tenant_name(request.name, "name"), request.reason
        changed = await self._services.run(
            caller, lambda service: service.suspend_tenant(name, suspended, reason=reason)
        )
        return codec.tenant_pb(changed)


def _matches(stored: StoredTenant, wanted: dict[str, str]) -> bool:
    policy = stored.policy
    values = {"class": policy.priority_class, "origin": stored.origin, "suspended": str(policy.suspended).lower()}
    values |= {f"labels.{key}": value for key, value in policy.labels.items()}
    return all(values.get(name) == value for name, value in wanted.items())


def _request_id(value: str) -> str:
    if len(value) > MAX_REQUEST_ID or not value.isprintable():
        raise invalid("request_id", f"must be at most {MAX_REQUEST_ID} printable characters")
    return value


class KeysAdmin:
    """The Keys service (tenants.proto). A caller cannot create, rotate or revoke keys of a role above its own."""

    def __init__(self, services: TenantServices) -> None:
        self._services = services

    async def Create(self, request: pb.CreateKeyRequest, caller: AdminCaller) -> pb.NewKey:
        """Create a key. The secret of the key is returned here and never again."""
        tenant, role = codec.tenant_name(request.parent, "parent"), request.key.role or "caller"
        options: dict[str, Any] = {
            "expires_at": codec.seconds_or_none(request.key, "expire_time"),
            "role": role,
            "request_id": _request_id(request.request_id),
            "validate_only": request.validate_only,
            "reason": request.reason,
        }
        created = await self._services.run(
            caller, lambda service: service.create_key(tenant, request.key.display_name, **options)
        )
        return pb.NewKey(key=codec.key_pb(created.stored, time.time()), secret=created.secret)

    async def List(self, request: pb.ListKeysRequest, caller: AdminCaller) -> pb.ListKeysResponse:
        """List the keys of a tenant."""
        tenant, size = codec.tenant_name(request.parent, "parent"), page_size(request.page_size)
        after = position_of(request.page_token, (float, str), "keys", tenant)
        keys = await self._services.run(caller, lambda service: service.keys(tenant))
        rest = [key for key in keys if after is None or (key.created_at, key.id) > after]
        page = rest[:size]
        more = next_token([page[-1].created_at, page[-1].id], "keys", tenant) if len(rest) > size else ""
        now_s = time.time()
        return pb.ListKeysResponse(keys=[codec.key_pb(key, now_s) for key in page], next_page_token=more)

    async def Rotate(self, request: pb.RotateKeyRequest, caller: AdminCaller) -> pb.NewKey:
        """Replace a key by a new key. The old key stays valid for `overlap_s` seconds."""
        tenant, key_id = codec.key_name(request.name, "name")
        overlap_s = request.overlap_s if request.HasField("overlap_s") else DEFAULT_OVERLAP_S
        options: dict[str, Any] = {"overlap_s": overlap_s, "reason": request.reason}
        options["expires_at"] = codec.seconds_or_none(request, "expire_time")
        created = await self._services.run(caller, lambda service: service.rotate_key(tenant, key_id, **options))
        return pb.NewKey(key=codec.key_pb(created.stored, time.time()), secret=created.secret)

    async def Revoke(self, request: pb.RevokeKeyRequest, caller: AdminCaller) -> pb.Key:
        """Revoke a key."""
        tenant, key_id = codec.key_name(request.name, "name")
        revoked = await self._services.run(
            caller, lambda service: service.revoke_key(tenant, key_id, reason=request.reason)
        )
        return codec.key_pb(revoked, time.time())


def objectives_of(models: Iterable[KnownModel]) -> dict[str, SloObjective]:
    """Return the SLOs of models, keyed by model name. A model without an SLO is left out."""
    entries = [model.entry for model in models]
    return {
        entry.name: SloObjective(entry.slo_ttft_s, entry.slo_itl_s, entry.slo_target)
        for entry in entries
        if entry.slo_ttft_s or entry.slo_itl_s
    }


class UsageAdmin:
    """The Usage service (usage.proto)."""

    def __init__(self, services: TenantServices, objectives: Callable[[], SloObjectives]) -> None:
        """`objectives` returns the SLOs of the models that the gateway knows."""
        self._services = services
        self._objectives = objectives

    async def Query(self, request: usage_pb2.QueryUsageRequest, caller: AdminCaller) -> usage_pb2.QueryUsageResponse:
        """Return sums of usage, one for each group of `group_by`."""
        groups = () if request.total else tuple(request.group_by) or ("tenant", "model")
        size = page_size(request.page_size)
        list_key = (
            "usage",
            *groups,
            request.parent,
            request.since_day,
            request.until_day,
            request.model,
            str(request.cost),
        )
        after = position_of(request.page_token, (str,) * len(groups), *list_key)
        rows = await self._services.read(
            lambda reports: reports.usage(_query(request, caller, groups), cost=request.cost)
        )
        rest = [row for row in rows if after is None or _group(row, groups) > after]
        page = rest[:size]
        more = next_token(list(_group(page[-1], groups)), *list_key) if len(rest) > size else ""
        sums = [_sum_pb(row, groups) for row in page]
        return usage_pb2.QueryUsageResponse(sums=sums, next_page_token=more)

    async def Export(
        self, request: usage_pb2.ExportUsageRequest, caller: AdminCaller
    ) -> AsyncIterator[usage_pb2.ExportUsageResponse]:
        """Stream usage records in order of time."""
        after: tuple[float, str] | None = None
        while True:
            start_after = after
            page = await self._services.read(
                lambda reports, start_after=start_after: reports.ledger.usage.records(  # type: ignore[misc]
                    _query(request, caller, ()), after=start_after, limit=EXPORT_PAGE
                ),
            )
            if page:
                records = [_record_pb(record, caller) for record in page]
                yield usage_pb2.ExportUsageResponse(records=records)
            if len(page) < EXPORT_PAGE:
                return
            after = (page[-1].opened_at_s, page[-1].record_id)

    async def QuerySlo(self, request: usage_pb2.QuerySloRequest, caller: AdminCaller) -> usage_pb2.QuerySloResponse:
        """Return how many calls met and missed the SLOs of their models, by tenant and model."""
        size = page_size(request.page_size)
        list_key = ("slo", request.parent, request.since_day, request.until_day, request.model)
        after = position_of(request.page_token, (str, str), *list_key)
        objectives = self._objectives()
        sums = await self._services.read(lambda reports: reports.slo(_query(request, caller, ()), objectives))
        rest = [each for each in sums if after is None or (each.tenant, each.model) > after]
        page = rest[:size]
        more = next_token([page[-1].tenant, page[-1].model], *list_key) if len(rest) > size else ""
        return usage_pb2.QuerySloResponse(sums=map(codec.slo_pb, page), next_page_token=more)


def _record_pb(record: UsageRecord, caller: AdminCaller) -> usage_pb2.UsageRecord:
    """Return a usage record as a message. A caller that may access only one tenant does not see the worker, pod, node
    and gateway of the call."""
    fields = record.as_json()
    if caller.scope:
        fields |= dict.fromkeys(("worker", "pod", "node", "gateway"), "")
    return usage_pb2.UsageRecord(**fields)


def _query(
    request: usage_pb2.QueryUsageRequest | usage_pb2.ExportUsageRequest | usage_pb2.QuerySloRequest,
    caller: AdminCaller,
    groups: Sequence[str],
) -> UsageQuery:
    return UsageQuery(
        tuple(groups),
        since_day=request.since_day,
        until_day=request.until_day,
        tenant=_tenant(request.parent, caller),
        model=request.model,
    )


def _tenant(parent: str, caller: AdminCaller) -> str:
    """Return the tenant to whose rows a query is restricted; "" for no restriction. `parent`: the tenant that the
    request names, or ""."""
    return codec.tenant_name(parent, "parent") if parent else caller.scope


def _group(row: dict[str, Any], groups: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in groups)


def _sum_pb(row: dict[str, Any], groups: Sequence[str]) -> usage_pb2.UsageSum:
    counts = {name: value for name, value in row.items() if name not in groups and value is not None}
    return usage_pb2.UsageSum(group=dict(zip(groups, _group(row, groups), strict=True)), **counts)


class AuditAdmin:
    """The Audit service (usage.proto)."""

    def __init__(self, services: TenantServices) -> None:
        self._services = services

    async def List(self, request: usage_pb2.ListAuditRequest, caller: AdminCaller) -> usage_pb2.ListAuditResponse:
        """List audit events, newest first."""
        tenant, size = _tenant(request.parent, caller), page_size(request.page_size)
        equal, since_s = (
            parse_filter(request.filter, _AUDIT_FILTER),
            codec.seconds_or_none(request, "since_time") or 0.0,
        )
        list_key = ("audit", tenant, request.filter, str(since_s))
        before: Any = position_of(request.page_token, (float, str), *list_key)
        rows = await self._services.read(
            lambda reports: reports.ledger.audit.list(
                tenant=tenant, equal=equal, since_s=since_s, before=before, limit=size + 1
            ),
        )
        page = rows[:size]
        more = next_token([page[-1]["at_s"], page[-1]["event_id"]], *list_key) if len(rows) > size else ""
        return usage_pb2.ListAuditResponse(events=[_event_pb(row, caller) for row in page], next_page_token=more)


def _event_pb(row: dict[str, Any], caller: AdminCaller) -> usage_pb2.AuditEvent:
    """Return an audit event as a message. A caller that may access only one tenant sees only the addresses of that
    tenant's actors."""
    event = usage_pb2.AuditEvent(time=codec.timestamp(row["at_s"]))
    details = row["details"] or {}
    hidden = caller.scope and details.get("of") != caller.scope
    shown = {name: value for name, value in row.items() if name not in ("at_s", "details")}
    json_format.ParseDict({**shown, "source": "" if hidden else row["source"]}, event)
    event.details.update(details)
    return event
