"""The tenant service: operations on tenants and keys for the admin API and the command line.

`TenantService` is the interface. `LedgerTenantService` implements the interface on a database. The CLI's
`RemoteTenantService` implements the interface over the admin API. Every attempted change is audited, even if the change
fails. Suspending a tenant, deleting a tenant and revoking a key need a reason. Usage and the audit log are read with
ledger/usage/reports.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from cluster.ledger.audit.audit import AuditEvent
from cluster.ledger.errors import AlreadyExists, LedgerError, NotPermitted
from cluster.ledger.rows import NewKey, StoredKey, StoredTenant
from cluster.policy.tenants.policy import PolicyError, TenantPolicy

if TYPE_CHECKING:
    from cluster.ledger.store import Ledger

T = TypeVar("T")
PAGE = 1000
DEFAULT_OVERLAP_S = 86400.0
"""Default time for which a rotated key stays valid, in seconds."""
PolicyOf = Callable[[str, Mapping[str, Any]], TenantPolicy]


class TenantService(Protocol):
    """Operations on tenants and on their API keys. Every operation may raise LedgerError or a subclass of
    LedgerError.

    The parameters `changes` and `own` map a tenant's fields, named as in the configuration, to values. The
    value None removes a field.
    """

    def create_tenant(self, name: str, own: Mapping[str, Any], *, reason: str = "") -> StoredTenant:
        """Create a tenant. The values in `own` override the tenant defaults."""

    def get_tenant(self, name: str) -> StoredTenant:
        """Return the tenant with the given name."""

    def tenants(self) -> Iterator[StoredTenant]:
        """Return all tenants, ordered by name."""

    def update_tenant(self, name: str, changes: Mapping[str, Any], *, reason: str = "") -> StoredTenant:
        """Change those fields of a tenant that are in `changes`. Limits, retention and labels are merged key by key."""

    def suspend_tenant(self, name: str, suspended: bool, *, reason: str = "") -> StoredTenant:
        """Suspend or resume a tenant."""

    def delete_tenant(self, name: str, *, erase: bool = False, reason: str = "") -> int:
        """Delete a tenant. With `erase`, erase all rows that name the tenant. Returns the number of erased rows."""

    def undelete_tenant(self, name: str, *, reason: str = "") -> StoredTenant:
        """Bring a deleted tenant back with its policy and keys, unless it was erased."""

    def create_key(
        self, tenant: str, name: str = "", *, expires_at: float | None = None, role: str = "caller", reason: str = ""
    ) -> NewKey:
        """Create a key for a tenant."""

    def keys(self, tenant: str) -> list[StoredKey]:
        """Return a tenant's keys, oldest first."""

    def rotate_key(
        self, tenant: str, key_id: str, *, overlap_s: float, expires_at: float | None = None, reason: str = ""
    ) -> NewKey:
        """Create the successor of a key. The old key stays valid for `overlap_s`."""

    def revoke_key(self, tenant: str, key_id: str, *, reason: str = "") -> StoredKey:
        """Revoke a tenant's key."""


@dataclass(frozen=True, slots=True)
class Actor:
    """The originator of an operation (`actor`) and the place that the request came from (`source`), as the audit log
    records them."""

    actor: str
    source: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


class _OperationAudit:
    """The audit of one caller's operations. Each operation writes one event, whether it succeeds or fails."""

    def __init__(self, by: Actor, write: Callable[[AuditEvent], None], clock: Callable[[], float]) -> None:
        self._by = by
        self._write = write
        self._clock = clock

    def run(
        self,
        action: str,
        name: str,
        tenant: str,
        reason: str,
        operation: Callable[[], T],
        *,
        details: Mapping[str, Any] | None = None,
        quiet: bool = False,
    ) -> T:
        """Run an operation and write one audit event about its outcome. `quiet`: write no event, because the operation
        is a dry run."""
        outcome, result = "internal", None
        try:
            result = operation()
            outcome = "ok"
            return result
        except PolicyError as error:
            outcome = LedgerError.outcome.value
            raise LedgerError(str(error)) from None
        except LedgerError as error:
            outcome = error.outcome.value
            raise
        finally:
            if not quiet:
                if isinstance(result, NewKey):
                    name = f"tenants/{tenant}/keys/{result.stored.id}" if action == "keys.create" else name
                self._write(self._event(action, name, tenant, reason, outcome, details or {}))

    def _event(
        self, action: str, name: str, tenant: str, reason: str, outcome: str, details: Mapping[str, Any]
    ) -> AuditEvent:
        return AuditEvent(
            at_s=self._clock(),
            kind="admin",
            action=action,
            actor=self._by.actor,
            tenant=tenant,
            object=name,
            outcome=outcome,
            reason=reason,
            source=self._by.source,
            details={**self._by.details, **details},
        )


class LedgerTenantService:
    """TenantService on a database. Operations run in the caller's thread.

    Construction is cheap, so every caller gets a separate instance. `policy_of` builds a policy from a tenant's name
    and fields. `write` receives audit events. `classes` has the valid priority classes; if empty, every class is
    valid. `may_grant` returns whether the caller may create, rotate and revoke keys with a given role.
    """

    def __init__(
        self,
        ledger: Ledger,
        by: Actor,
        write: Callable[[AuditEvent], None],
        policy_of: PolicyOf,
        *,
        clock: Callable[[], float],
        classes: Collection[str] = (),
        may_grant: Callable[[str], bool] = lambda role: True,
    ) -> None:
        self._ledger = ledger
        self._audit = _OperationAudit(by, write, clock)
        self._policy_of = policy_of
        self._classes = frozenset(classes)
        self._may_grant = may_grant

    # ---- tenants

    def create_tenant(
        self,
        name: str,
        own: Mapping[str, Any],
        *,
        reason: str = "",
        request_id: str = "",
        validate_only: bool = False,
    ) -> StoredTenant:
        """Implements `TenantService.create_tenant`.

        With `request_id`, the request may be a retry: if the tenant exists already with the same policy, return it.
        """

        def operation() -> StoredTenant:
            policy = self._policy_of(name, own)
            self._require_class(policy.priority_class)
            try:
                return self._ledger.tenants.create(policy, validate_only=validate_only)
            except AlreadyExists:
                existing = self._find_same(policy) if request_id else None
                if existing is None:
                    raise
                return existing

        return self._audit.run("tenants.create", f"tenants/{name}", name, reason, operation, quiet=validate_only)

    def _find_same(self, policy: TenantPolicy) -> StoredTenant | None:
        """Return the existing tenant with origin `api` and exactly the given policy, or None."""
        try:
            existing = self._ledger.tenants.get(policy.name)
        except LedgerError:
            return None
        return existing if existing.origin == "api" and existing.policy == policy else None

    def _require_class(self, name: object) -> None:
        if self._classes and name is not None and name not in self._classes:
            raise LedgerError(f"class: {name!r} must be one of {', '.join(sorted(self._classes))}")

    def get_tenant(self, name: str) -> StoredTenant:
        """Implements `TenantService.get_tenant`."""
        return self._ledger.tenants.get(name)

    def tenants(self, after: str = "") -> Iterator[StoredTenant]:
        """Return the tenants in the order of their names, beginning after the name `after`."""
        while page := self._ledger.tenants.list(after=after, limit=PAGE):
            yield from page
            after = page[-1].policy.name

    def update_tenant(
        self,
        name: str,
        changes: Mapping[str, Any],
        *,
        reason: str = "",
        whole: Collection[str] = (),
        validate_only: bool = False,
    ) -> StoredTenant:
        """Implements `TenantService.update_tenant`. `whole` names fields, such as `limits`, that are replaced instead
        of merged key by key."""

        def operation() -> StoredTenant:
            if not changes:
                raise LedgerError("update_mask: names no field, and the tenant sets none: there is nothing to change")
            self._require_class(changes.get("class"))
            return self._ledger.tenants.update(name, changes, whole=whole, validate_only=validate_only)

        details = {"fields": _paths(changes)}
        return self._audit.run(
            "tenants.update", f"tenants/{name}", name, reason, operation, details=details, quiet=validate_only
        )

    def suspend_tenant(self, name: str, suspended: bool, *, reason: str = "") -> StoredTenant:
        """Implements `TenantService.suspend_tenant`."""
        action = "tenants.suspend" if suspended else "tenants.resume"
        if suspended:
            require_reason(reason)
        return self._audit.run(
            action, f"tenants/{name}", name, reason, lambda: self._ledger.tenants.suspend(name, suspended)
        )

    def delete_tenant(self, name: str, *, erase: bool = False, reason: str = "", validate_only: bool = False) -> int:
        """Implements `TenantService.delete_tenant`."""
        require_reason(reason)
        if erase:
            # the audit event keeps the actor and the reason, but not the tenant's name
            from cluster.ledger.tenants.tenants import digest_of_name

            erased_name, redacted_reason = f"tenants/{digest_of_name(name)[:16]}", reason.replace(name, "…")
            tenants = self._ledger.tenants
            return self._audit.run(
                "tenants.erase",
                erased_name,
                "",
                redacted_reason,
                lambda: tenants.erase(name, validate_only=validate_only),
                quiet=validate_only,
            )

        def operation() -> int:
            self._ledger.tenants.delete(name, validate_only=validate_only)
            return 0

        return self._audit.run("tenants.delete", f"tenants/{name}", name, reason, operation, quiet=validate_only)

    def undelete_tenant(self, name: str, *, reason: str = "") -> StoredTenant:
        """Implements `TenantService.undelete_tenant`."""
        return self._audit.run(
            "tenants.undelete", f"tenants/{name}", name, reason, lambda: self._ledger.tenants.undelete(name)
        )

    # ---- keys

    def create_key(
        self,
        tenant: str,
        name: str = "",
        *,
        expires_at: float | None = None,
        role: str = "caller",
        reason: str = "",
        request_id: str = "",
        validate_only: bool = False,
    ) -> NewKey:
        """Implements `TenantService.create_key`. A repeated `request_id` creates no second key."""

        def operation() -> NewKey:
            self._require_grant(role)
            return self._ledger.keys.create(
                tenant, name, expires_at=expires_at, role=role, request_id=request_id, validate_only=validate_only
            )

        return self._audit.run(
            "keys.create",
            f"tenants/{tenant}/keys/",
            tenant,
            reason,
            operation,
            details={"key_role": role},
            quiet=validate_only,
        )

    def keys(self, tenant: str) -> list[StoredKey]:
        """Implements `TenantService.keys`."""
        return self._ledger.keys.list(tenant)

    def rotate_key(
        self, tenant: str, key_id: str, *, overlap_s: float, expires_at: float | None = None, reason: str = ""
    ) -> NewKey:
        """Implements `TenantService.rotate_key`."""

        def operation() -> NewKey:
            self._require_grant(self._ledger.keys.get(tenant, key_id).role)
            return self._ledger.keys.rotate(tenant, key_id, overlap_s=overlap_s, expires_at=expires_at)

        return self._audit.run("keys.rotate", f"tenants/{tenant}/keys/{key_id}", tenant, reason, operation)

    def revoke_key(self, tenant: str, key_id: str, *, reason: str = "") -> StoredKey:
        """Implements `TenantService.revoke_key`."""
        require_reason(reason)

        def operation() -> StoredKey:
            self._require_grant(self._ledger.keys.get(tenant, key_id).role)
            return self._ledger.keys.revoke(tenant, key_id)

        return self._audit.run("keys.revoke", f"tenants/{tenant}/keys/{key_id}", tenant, reason, operation)

    def _require_grant(self, role: str) -> None:
        if not self._may_grant(role):
            raise NotPermitted(f"your role does not permit changes to keys of the role {role[:32]!r}")


def require_reason(reason: str) -> None:
    """Raise LedgerError if the reason for a destructive operation is empty."""
    if not reason.strip():
        raise LedgerError("reason: must say why; it goes to the audit log")


def _paths(changes: Mapping[str, Any]) -> list[str]:
    """Return the changed fields as sorted paths, e.g. limits.daily_tokens."""
    paths = []
    for name, value in changes.items():
        paths += [f"{name}.{key}" for key in value] if isinstance(value, Mapping) and value else [name]
    return sorted(paths)
