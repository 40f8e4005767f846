"""The tenant service and the usage reports over a gateway's admin API. ledger/tenants/service.py and
ledger/usage/reports.py have the implementations that use the database."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict

from cluster.admin.v1 import tenants_pb2 as pb
from cluster.admin.v1 import tenants_pb2_grpc, usage_pb2, usage_pb2_grpc
from cluster.cli.target.access import Access
from cluster.client.errors import from_rpc
from cluster.gateway.apis.admin import codec
from cluster.ledger.errors import AlreadyExists, LedgerError, ManagedByFile, NotFound, StoreUnavailable
from cluster.ledger.rows import NewKey, Prices, StoredKey, StoredTenant, UsageQuery
from cluster.ledger.slo import SloObjectives, SloSum
from cluster.ledger.usage.records import UsageRecord

TIMEOUT_S = 60.0
PAGE = 500
_KINDS: Mapping[str, type[LedgerError]] = {
    kind.outcome.name: kind for kind in (LedgerError, NotFound, AlreadyExists, ManagedByFile, StoreUnavailable)
}


class AdminConnection:
    """A connection to a gateway's admin API.

    The methods raise the same LedgerErrors as the services that use the database. For any other error, such as wrong
    credentials or a role without the permission, they raise HeadraceError.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self.channel = access.channel()

    def close(self) -> None:
        """Close the connection to the gateway."""
        self.channel.close()

    def call(self, method: Callable[..., Any], request: Any) -> Any:
        """Call a unary method and return its response."""
        try:
            return method(request, timeout=TIMEOUT_S, metadata=self._access.metadata)
        except grpc.RpcError as error:
            raise self._converted(error) from None

    def stream(self, method: Callable[..., Any], request: Any) -> Iterator[Any]:
        """Call a streaming method, and yield its responses."""
        try:
            yield from method(request, timeout=TIMEOUT_S, metadata=self._access.metadata)
        except grpc.RpcError as error:
            raise self._converted(error) from None

    def pages(self, method: Callable[..., Any], request: Any) -> Iterator[Any]:
        """Call a list method for all pages, and yield the pages."""
        request.page_size = PAGE
        while True:
            page = self.call(method, request)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def _converted(self, error: grpc.RpcError) -> Exception:
        """Convert a gRPC error to the LedgerError with the same reason, or to a HeadraceError if no LedgerError has
        this reason."""
        converted = from_rpc(error, endpoint=self._access.address)
        kind = _KINDS.get(converted.reason)
        return converted if kind is None else kind(converted.message)


class RemoteTenantService:
    """A TenantService over the admin API."""

    def __init__(self, connection: AdminConnection) -> None:
        self._connection = connection
        self._tenants = tenants_pb2_grpc.TenantsStub(connection.channel)
        self._keys = tenants_pb2_grpc.KeysStub(connection.channel)

    def create_tenant(self, name: str, own: Mapping[str, Any], *, reason: str = "") -> StoredTenant:
        """Implements `TenantService.create_tenant`."""
        tenant, _, empty = codec.tenant_and_paths(name, own)
        request = pb.CreateTenantRequest(tenant=tenant, reason=reason)
        request.unset_mask.paths.extend(empty)
        return codec.stored_tenant(self._connection.call(self._tenants.Create, request))

    def get_tenant(self, name: str) -> StoredTenant:
        """Implements `TenantService.get_tenant`."""
        return codec.stored_tenant(
            self._connection.call(self._tenants.Get, pb.GetTenantRequest(name=f"tenants/{name}"))
        )

    def tenants(self) -> Iterator[StoredTenant]:
        """Implements `TenantService.tenants`."""
        for page in self._connection.pages(self._tenants.List, pb.ListTenantsRequest()):
            yield from map(codec.stored_tenant, page.tenants)

    def update_tenant(self, name: str, changes: Mapping[str, Any], *, reason: str = "") -> StoredTenant:
        """Implements `TenantService.update_tenant`."""
        tenant, paths, _ = codec.tenant_and_paths(name, changes)
        request = pb.UpdateTenantRequest(tenant=tenant, reason=reason)
        request.update_mask.paths.extend(paths)
        return codec.stored_tenant(self._connection.call(self._tenants.Update, request))

    def suspend_tenant(self, name: str, suspended: bool, *, reason: str = "") -> StoredTenant:
        """Implements `TenantService.suspend_tenant`."""
        named = {"name": f"tenants/{name}", "reason": reason}
        if suspended:
            return codec.stored_tenant(self._connection.call(self._tenants.Suspend, pb.SuspendTenantRequest(**named)))
        return codec.stored_tenant(self._connection.call(self._tenants.Resume, pb.ResumeTenantRequest(**named)))

    def delete_tenant(self, name: str, *, erase: bool = False, reason: str = "") -> int:
        """Implements `TenantService.delete_tenant`."""
        request = pb.DeleteTenantRequest(name=f"tenants/{name}", erase=erase, reason=reason)
        return int(self._connection.call(self._tenants.Delete, request).erased_rows)

    def undelete_tenant(self, name: str, *, reason: str = "") -> StoredTenant:
        """Implements `TenantService.undelete_tenant`."""
        request = pb.UndeleteTenantRequest(name=f"tenants/{name}", reason=reason)
        return codec.stored_tenant(self._connection.call(self._tenants.Undelete, request))

    def create_key(
        self, tenant: str, name: str = "", *, expires_at: float | None = None, role: str = "caller", reason: str = ""
    ) -> NewKey:
        """Implements `TenantService.create_key`."""
        key = pb.Key(display_name=name, role=role, expire_time=codec.timestamp(expires_at))
        request = pb.CreateKeyRequest(parent=f"tenants/{tenant}", key=key, reason=reason)
        return _new_key(self._connection.call(self._keys.Create, request))

    def keys(self, tenant: str) -> list[StoredKey]:
        """Implements `TenantService.keys`."""
        pages = self._connection.pages(self._keys.List, pb.ListKeysRequest(parent=f"tenants/{tenant}"))
        return [codec.stored_key(key) for page in pages for key in page.keys]

    def rotate_key(
        self, tenant: str, key_id: str, *, overlap_s: float, expires_at: float | None = None, reason: str = ""
    ) -> NewKey:
        """Implements `TenantService.rotate_key`."""
        request = pb.RotateKeyRequest(
            name=f"tenants/{tenant}/keys/{key_id}",
            overlap_s=overlap_s,
            expire_time=codec.timestamp(expires_at),
            reason=reason,
        )
        return _new_key(self._connection.call(self._keys.Rotate, request))

    def revoke_key(self, tenant: str, key_id: str, *, reason: str = "") -> StoredKey:
        """Implements `TenantService.revoke_key`."""
        request = pb.RevokeKeyRequest(name=f"tenants/{tenant}/keys/{key_id}", reason=reason)
        return codec.stored_key(self._connection.call(self._keys.Revoke, request))


class RemoteUsageReports:
    """UsageReports over the admin API."""

    def __init__(self, connection: AdminConnection) -> None:
        self._connection = connection
        self._usage = usage_pb2_grpc.UsageStub(connection.channel)
        self._audit = usage_pb2_grpc.AuditStub(connection.channel)

    def usage(self, wanted: UsageQuery, rates: Prices | None = None, *, cost: bool = False) -> list[dict[str, Any]]:
        """Implements `UsageReports.usage`."""
        if rates is not None:
            raise LedgerError("--gpu-hour: a gateway uses the prices of its own `cost` section; omit it, or use -f")
        request = usage_pb2.QueryUsageRequest(
            **_query_fields(wanted), group_by=wanted.group_by, total=not wanted.group_by, cost=cost
        )
        return [
            _sum(item, wanted, cost)
            for page in self._connection.pages(self._usage.Query, request)
            for item in page.sums
        ]

    def records(self, wanted: UsageQuery) -> Iterator[UsageRecord]:
        """Implements `UsageReports.records`."""
        request = usage_pb2.ExportUsageRequest(**_query_fields(wanted))
        for page in self._connection.stream(self._usage.Export, request):
            yield from map(_record, page.records)

    def slo(self, wanted: UsageQuery, objectives: SloObjectives | None = None) -> list[SloSum]:
        """Implements `UsageReports.slo`. `objectives` must be None, because the gateway uses the SLOs of its own
        catalog."""
        if objectives is not None:
            raise LedgerError("objectives: a gateway uses the SLOs of its own catalog")
        request = usage_pb2.QuerySloRequest(**_query_fields(wanted))
        return [
            codec.slo_sum(item) for page in self._connection.pages(self._usage.QuerySlo, request) for item in page.sums
        ]

    def audit(
        self, *, tenant: str = "", equal: Mapping[str, str] | None = None, since_s: float = 0.0
    ) -> Iterator[dict[str, Any]]:
        """Implements `UsageReports.audit`."""
        request = usage_pb2.ListAuditRequest(
            parent=f"tenants/{tenant}" if tenant else "",
            filter=" AND ".join(f'{name} = "{value}"' for name, value in (equal or {}).items()),
            since_time=codec.timestamp(since_s),
        )
        for page in self._connection.pages(self._audit.List, request):
            yield from map(_event, page.events)


def _new_key(message: pb.NewKey) -> NewKey:
    return NewKey(codec.stored_key(message.key), message.secret)


def _query_fields(wanted: UsageQuery) -> dict[str, Any]:
    return {
        "parent": f"tenants/{wanted.tenant}" if wanted.tenant else "",
        "since_day": wanted.since_day,
        "until_day": wanted.until_day,
        "model": wanted.model,
    }


def _sum(message: usage_pb2.UsageSum, wanted: UsageQuery, cost: bool) -> dict[str, Any]:
    row: dict[str, Any] = {name: message.group[name] for name in wanted.group_by}
    for field in message.DESCRIPTOR.fields:
        if field.name not in ("group", "cost", "currency"):
            row[field.name] = getattr(message, field.name)
    if cost:
        row |= {"cost": message.cost if message.HasField("cost") else None, "currency": message.currency}
    return row


def _record(message: usage_pb2.UsageRecord) -> UsageRecord:
    row = {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
    unset = [name for name in ("ttft_s", "predicted_cached_tokens") if not message.HasField(name)]
    row |= {"labels": dict(message.labels), **dict.fromkeys(unset)}
    return UsageRecord.from_json(row)


def _event(message: usage_pb2.AuditEvent) -> dict[str, Any]:
    row: dict[str, Any] = {
        field.name: getattr(message, field.name)
        for field in message.DESCRIPTOR.fields
        if field.name not in ("time", "details")
    }
    return row | {"at_s": codec.seconds(message.time), "details": MessageToDict(message.details)}
