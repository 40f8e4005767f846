"""cluster.admin.v1 over the ledger: Tenants, Keys, Usage and Audit. Imported by a gateway with `auth` alone."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
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
from cluster.gateway.apis.admin.pages import after_of, next_token, page_size, terms
from cluster.ledger.audit.audit import AuditEvent
from cluster.ledger.errors import LedgerError, StoreUnavailable
from cluster.ledger.rows import Prices, UsageQuery
from cluster.ledger.tenants.service import ROTATION_S, By, LedgerTenantService
from cluster.ledger.usage.records import UsageRecord
from cluster.policy.tenants.identity import may_grant

if TYPE_CHECKING:
    from cluster.config.schema import Config
    from cluster.gateway.auth.tenants import TenantAuthenticator
    from cluster.ledger.rows import StoredTenant

log = structlog.get_logger("admin")

T = TypeVar("T")
EXPORT_PAGE = 500
MAX_REQUEST_ID = 128
_FIELD = re.compile(r"[a-z][A-Za-z0-9_.\[\]]*")
_TENANT_FILTER = {"class": "class", "origin": "origin", "suspended": "suspended", "labels": "labels.x"}
_AUDIT_FILTER = {name: name for name in ("kind", "action", "actor", "object", "outcome")}


class TenantServices:
    """A desk for each who asks, and what it refuses as the API's error."""

    def __init__(self, config: Config, tenants: TenantAuthenticator, door: AdminAuthorizer) -> None:
        self._tenants = tenants
        self._door = door
        self._policy_of = config.tenant_defaults.policy
        self._classes = {one.name for one in config.classes}
        self._rates = Prices(config.cost.currency, dict(config.cost.gpu_hour)) if config.cost else None

    async def ask(self, asker: AdminCaller, act: Callable[[LedgerTenantService], T]) -> T:
        """Work at the asker's desk, off the event loop. Raises CallError."""
        by = By(asker.actor, asker.source, details_of(asker))
        desk = LedgerTenantService(
            self._tenants.ledger,
            by,
            self._write,
            self._policy_of,
            clock=time.time,
            classes=self._classes,
            may_grant=partial(may_grant, asker.principal),
            rates=self._rates,
        )
        try:
            return await self._door.in_thread(act, desk)
        except LedgerError as error:
            raise _told(error) from None

    def _write(self, event: AuditEvent) -> None:
        """An act is in the audit before its answer is out; while the database is away, in the file."""
        self._tenants.audit.write(event)
        if event.outcome != Outcome.STORE_UNAVAILABLE.value:
            self._tenants.audit.flush()


def _told(error: LedgerError) -> CallError:
    if isinstance(error, StoreUnavailable):  # where the database is, is nobody's business
        log.warning("store_unavailable", error=str(error))
        return CallError(error.outcome, "the ledger's database does not answer; retry shortly")
    field, sign, remedy = str(error).partition(": ")
    if error.outcome is Outcome.INVALID_FIELD and sign and _FIELD.fullmatch(field):
        return CallError(error.outcome, str(error), violations=[Violation(field, remedy)])
    return CallError(error.outcome, str(error))


class TenantsAdmin:
    """See tenants.proto; whoever comes here may do it."""

    def __init__(self, desks: TenantServices) -> None:
        self._desks = desks

    async def Create(self, request: pb.CreateTenantRequest, asker: AdminCaller) -> pb.Tenant:
        """See tenants.proto."""
        name = codec.tenant_name(request.tenant.name, "tenant.name")
        own = codec.own_fields(request.tenant, request.unset_mask.paths)
        options: dict[str, Any] = {"request_id": _request_id(request.request_id), "reason": request.reason}
        options["validate_only"] = request.validate_only
        return codec.tenant_pb(await self._desks.ask(asker, lambda desk: desk.create_tenant(name, own, **options)))

    async def Get(self, request: pb.GetTenantRequest, asker: AdminCaller) -> pb.Tenant:
        """See tenants.proto."""
        name = codec.tenant_name(request.name, "name")
        return codec.tenant_pb(await self._desks.ask(asker, lambda desk: desk.get_tenant(name)))

    async def List(self, request: pb.ListTenantsRequest, asker: AdminCaller) -> pb.ListTenantsResponse:
        """See tenants.proto."""
        size, wanted = page_size(request.page_size), terms(request.filter, _TENANT_FILTER)
        after = after_of(request.page_token, (str,), "tenants", request.filter)

        def read(desk: LedgerTenantService) -> list[StoredTenant]:
            found = [desk.get_tenant(asker.scope)] if asker.scope else desk.tenants(after[0] if after else "")
            return list(islice((one for one in found if _fits(one, wanted)), size + 1))

        found = await self._desks.ask(asker, read)
        more = next_token([found[size - 1].policy.name], "tenants", request.filter) if len(found) > size else ""
        return pb.ListTenantsResponse(tenants=map(codec.tenant_pb, found[:size]), next_page_token=more)

    async def Update(self, request: pb.UpdateTenantRequest, asker: AdminCaller) -> pb.Tenant:
        """See tenants.proto."""
        name = codec.tenant_name(request.tenant.name, "tenant.name")
        changes, whole = codec.changes(request.tenant, request.update_mask.paths)
        options: dict[str, Any] = {"whole": whole, "validate_only": request.validate_only, "reason": request.reason}
        return codec.tenant_pb(await self._desks.ask(asker, lambda desk: desk.update_tenant(name, changes, **options)))

    async def Delete(self, request: pb.DeleteTenantRequest, asker: AdminCaller) -> pb.DeleteTenantResponse:
        """See tenants.proto."""
        name = codec.tenant_name(request.name, "name")
        options = {"erase": request.erase, "validate_only": request.validate_only}
        rows = await self._desks.ask(asker, lambda desk: desk.delete_tenant(name, reason=request.reason, **options))
        return pb.DeleteTenantResponse(erased_rows=rows)

    async def Suspend(self, request: pb.SuspendTenantRequest, asker: AdminCaller) -> pb.Tenant:
        """See tenants.proto."""
        return await self._suspend(request, True, asker)

    async def Resume(self, request: pb.ResumeTenantRequest, asker: AdminCaller) -> pb.Tenant:
        """See tenants.proto."""
        return await self._suspend(request, False, asker)

    async def _suspend(
        self, request: pb.SuspendTenantRequest | pb.ResumeTenantRequest, suspended: bool, asker: AdminCaller
    ) -> pb.Tenant:
        name, reason = codec.tenant_name(request.name, "name"), request.reason
        changed = await self._desks.ask(asker, lambda desk: desk.suspend_tenant(name, suspended, reason=reason))
        return codec.tenant_pb(changed)


def _fits(stored: StoredTenant, wanted: dict[str, str]) -> bool:
    policy = stored.policy
    have = {"class": policy.priority_class, "origin": stored.origin, "suspended": str(policy.suspended).lower()}
    have |= {f"labels.{key}": value for key, value in policy.labels.items()}
    return all(have.get(name) == value for name, value in wanted.items())


def _request_id(value: str) -> str:
    if len(value) > MAX_REQUEST_ID or not value.isprintable():
        raise invalid("request_id", f"must be at most {MAX_REQUEST_ID} printable characters")
    return value


class KeysAdmin:
    """See tenants.proto. Nobody makes, replaces or ends a key of a role beyond the own."""

    def __init__(self, desks: TenantServices) -> None:
        self._desks = desks

    async def Create(self, request: pb.CreateKeyRequest, asker: AdminCaller) -> pb.NewKey:
        """See tenants.proto."""
        tenant, role = codec.tenant_name(request.parent, "parent"), request.key.role or "caller"
        options: dict[str, Any] = {
            "expires_at": codec.seconds_or_none(request.key, "expire_time"),
            "role": role,
            "request_id": _request_id(request.request_id),
            "validate_only": request.validate_only,
            "reason": request.reason,
        }
        made = await self._desks.ask(asker, lambda desk: desk.create_key(tenant, request.key.display_name, **options))
        return pb.NewKey(key=codec.key_pb(made.stored, time.time()), secret=made.secret)

    async def List(self, request: pb.ListKeysRequest, asker: AdminCaller) -> pb.ListKeysResponse:
        """See tenants.proto."""
        tenant, size = codec.tenant_name(request.parent, "parent"), page_size(request.page_size)
        after = after_of(request.page_token, (float, str), "keys", tenant)
        found = await self._desks.ask(asker, lambda desk: desk.keys(tenant))
        rest = [one for one in found if after is None or (one.created_at, one.id) > after]
        page = rest[:size]
        more = next_token([page[-1].created_at, page[-1].id], "keys", tenant) if len(rest) > size else ""
        now_s = time.time()
        return pb.ListKeysResponse(keys=[codec.key_pb(one, now_s) for one in page], next_page_token=more)

    async def Rotate(self, request: pb.RotateKeyRequest, asker: AdminCaller) -> pb.NewKey:
        """See tenants.proto."""
        tenant, key_id = codec.key_name(request.name, "name")
        overlap_s = request.overlap_s if request.HasField("overlap_s") else ROTATION_S
        options: dict[str, Any] = {"overlap_s": overlap_s, "reason": request.reason}
        options["expires_at"] = codec.seconds_or_none(request, "expire_time")
        made = await self._desks.ask(asker, lambda desk: desk.rotate_key(tenant, key_id, **options))
        return pb.NewKey(key=codec.key_pb(made.stored, time.time()), secret=made.secret)

    async def Revoke(self, request: pb.RevokeKeyRequest, asker: AdminCaller) -> pb.Key:
        """See tenants.proto."""
        tenant, key_id = codec.key_name(request.name, "name")
        ended = await self._desks.ask(asker, lambda desk: desk.revoke_key(tenant, key_id, reason=request.reason))
        return codec.key_pb(ended, time.time())


class UsageAdmin:
    """See usage.proto."""

    def __init__(self, desks: TenantServices) -> None:
        self._desks = desks

    async def Query(self, request: usage_pb2.QueryUsageRequest, asker: AdminCaller) -> usage_pb2.QueryUsageResponse:
        """See usage.proto."""
        groups = () if request.total else tuple(request.group_by) or ("tenant", "model")
        size = page_size(request.page_size)
        of = ("usage", *groups, request.parent, request.since_day, request.until_day, request.model, str(request.cost))
        after = after_of(request.page_token, (str,) * len(groups), *of)
        rows = await self._desks.ask(asker, lambda desk: desk.usage(_query(request, asker, groups), cost=request.cost))
        rest = [row for row in rows if after is None or _group(row, groups) > after]
        page = rest[:size]
        more = next_token(list(_group(page[-1], groups)), *of) if len(rest) > size else ""
        sums = [_sum_pb(row, groups) for row in page]
        return usage_pb2.QueryUsageResponse(sums=sums, next_page_token=more)

    async def Export(
        self, request: usage_pb2.ExportUsageRequest, asker: AdminCaller
    ) -> AsyncIterator[usage_pb2.ExportUsageResponse]:
        """See usage.proto."""
        after: tuple[float, str] | None = None
        while True:
            behind = after
            page = await self._desks.ask(
                asker,
                lambda desk, behind=behind: desk.ledger.usage.records(  # type: ignore[misc]
                    _query(request, asker, ()), after=behind, limit=EXPORT_PAGE
                ),
            )
            if page:
                records = [_record_pb(one, asker) for one in page]
                yield usage_pb2.ExportUsageResponse(records=records)
            if len(page) < EXPORT_PAGE:
                return
            after = (page[-1].opened_at_s, page[-1].record_id)


def _record_pb(record: UsageRecord, asker: AdminCaller) -> usage_pb2.UsageRecord:
    """Where calls run is the operators' to know."""
    fields = record.as_json()
    if asker.scope:
        fields |= dict.fromkeys(("worker", "pod", "node", "gateway"), "")
    return usage_pb2.UsageRecord(**fields)


def _query(
    request: usage_pb2.QueryUsageRequest | usage_pb2.ExportUsageRequest, asker: AdminCaller, groups: Sequence[str]
) -> UsageQuery:
    return UsageQuery(
        tuple(groups),
        since_day=request.since_day,
        until_day=request.until_day,
        tenant=_tenant(request.parent, asker),
        model=request.model,
    )


def _tenant(parent: str, asker: AdminCaller) -> str:
    """Whose things are read: the one named, else all that the asker may see."""
    return codec.tenant_name(parent, "parent") if parent else asker.scope


def _group(row: dict[str, Any], groups: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in groups)


def _sum_pb(row: dict[str, Any], groups: Sequence[str]) -> usage_pb2.UsageSum:
    counts = {name: value for name, value in row.items() if name not in groups and value is not None}
    return usage_pb2.UsageSum(group=dict(zip(groups, _group(row, groups), strict=True)), **counts)


class AuditAdmin:
    """See usage.proto."""

    def __init__(self, desks: TenantServices) -> None:
        self._desks = desks

    async def List(self, request: usage_pb2.ListAuditRequest, asker: AdminCaller) -> usage_pb2.ListAuditResponse:
        """See usage.proto."""
        tenant, size = _tenant(request.parent, asker), page_size(request.page_size)
        equal, since_s = terms(request.filter, _AUDIT_FILTER), codec.seconds_or_none(request, "since_time") or 0.0
        of = ("audit", tenant, request.filter, str(since_s))
        before: Any = after_of(request.page_token, (float, str), *of)
        rows = await self._desks.ask(
            asker,
            lambda desk: desk.ledger.audit.list(
                tenant=tenant, equal=equal, since_s=since_s, before=before, limit=size + 1
            ),
        )
        page = rows[:size]
        more = next_token([page[-1]["at_s"], page[-1]["event_id"]], *of) if len(rows) > size else ""
        return usage_pb2.ListAuditResponse(events=[_event_pb(row, asker) for row in page], next_page_token=more)


def _event_pb(row: dict[str, Any], asker: AdminCaller) -> usage_pb2.AuditEvent:
    """As the API shows it; where the cluster's operators work from is no tenant's business."""
    event = usage_pb2.AuditEvent(time=codec.timestamp(row["at_s"]))
    details = row["details"] or {}
    hidden = asker.scope and details.get("of") != asker.scope
    shown = {name: value for name, value in row.items() if name not in ("at_s", "details")}
    json_format.ParseDict({**shown, "source": "" if hidden else row["source"]}, event)
    event.details.update(details)
    return event
