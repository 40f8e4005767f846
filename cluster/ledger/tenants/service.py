"""The desk at which tenants and keys are kept: what the admin API and the command line do, each act audited.

`Desk` is the port: `LedgerTenantService` works on a database, and a client of the admin API can stand in its place.
Acts that take something away want a reason. What was refused is in the audit too, with its outcome.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from cluster.ledger.audit.audit import AuditEvent
from cluster.ledger.errors import AlreadyExists, LedgerError, NotPermitted
from cluster.ledger.rows import NewKey, Prices, StoredKey, StoredTenant, UsageQuery
from cluster.ledger.usage.records import UsageRecord
from cluster.policy.tenants.policy import PolicyError, TenantPolicy

if TYPE_CHECKING:
    from cluster.ledger.store import Ledger

T = TypeVar("T")
PAGE = 1000
ROTATION_S = 86400.0
"""For how long a rotated key goes on where nobody says otherwise."""
PolicyOf = Callable[[str, Mapping[str, Any]], TenantPolicy]


class TenantService(Protocol):
    """Raises LedgerError and its kinds. `changes` and `own` have the configuration's names, None takes away."""

    def create_tenant(self, name: str, own: Mapping[str, Any], *, reason: str = "") -> StoredTenant:
        """A tenant of the defaults, and over them `own`."""

    def get_tenant(self, name: str) -> StoredTenant:
        """One."""

    def tenants(self) -> Iterator[StoredTenant]:
        """All, by name."""

    def update_tenant(self, name: str, changes: Mapping[str, Any], *, reason: str = "") -> StoredTenant:
        """Change what is given; limits, retention and labels key by key."""

    def suspend_tenant(self, name: str, suspended: bool, *, reason: str = "") -> StoredTenant:
        """Suspend or resume."""

    def delete_tenant(self, name: str, *, erase: bool = False, reason: str = "") -> int:
        """Take a tenant away; how many rows were erased."""

    def create_key(
        self, tenant: str, name: str = "", *, expires_at: float | None = None, role: str = "caller", reason: str = ""
    ) -> NewKey:
        """A new key."""

    def keys(self, tenant: str) -> list[StoredKey]:
        """A tenant's keys, oldest first."""

    def rotate_key(
        self, tenant: str, key_id: str, *, overlap_s: float, expires_at: float | None = None, reason: str = ""
    ) -> NewKey:
        """A key's successor."""

    def revoke_key(self, tenant: str, key_id: str, *, reason: str = "") -> StoredKey:
        """End a key."""

    def usage(self, wanted: UsageQuery, rates: Prices | None = None, *, cost: bool = False) -> list[dict[str, Any]]:
        """Sums by group. `cost`: priced, by `rates` or by those that the desk has."""

    def records(self, wanted: UsageQuery) -> Iterator[UsageRecord]:
        """Single calls in order of time."""

    def audit(
        self, *, tenant: str = "", equal: Mapping[str, str] | None = None, since_s: float = 0.0
    ) -> Iterator[dict[str, Any]]:
        """Events, newest first."""


@dataclass(frozen=True, slots=True)
class By:
    """Who asks, and from where."""

    actor: str
    source: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


class LedgerTenantService:
    """Implements Desk on a database, in the caller's thread. Cheap: one is made for each who asks.

    `policy_of` makes a whole policy of a name and what is given; `write` takes audit events; `classes` are the
    priority classes there are, all when empty; `may_grant` says of which roles keys may be made, replaced and ended.
    """

    def __init__(
        self,
        ledger: Ledger,
        by: By,
        write: Callable[[AuditEvent], None],
        policy_of: PolicyOf,
        *,
        clock: Callable[[], float],
        classes: Collection[str] = (),
        may_grant: Callable[[str], bool] = lambda role: True,
        rates: Prices | None = None,
    ) -> None:
        self.ledger = ledger
        self._by = by
        self._write = write
        self._policy_of = policy_of
        self._clock = clock
        self._classes = frozenset(classes)
        self._may_grant = may_grant
        self._rates = rates

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
        """See Desk. With `request_id` a tenant that is there just as asked for is the answer."""

        def act() -> StoredTenant:
            policy = self._checked(self._policy_of(name, own))
            try:
                return self.ledger.tenants.create(policy, validate_only=validate_only)
            except AlreadyExists:
                found = self._same(policy) if request_id else None
                if found is None:
                    raise
                return found

        return self._done("tenants.create", f"tenants/{name}", name, reason, act, quiet=validate_only)

    def _same(self, policy: TenantPolicy) -> StoredTenant | None:
        """The tenant that the API has made just so."""
        try:
            found = self.ledger.tenants.get(policy.name)
        except LedgerError:
            return None
        return found if found.origin == "api" and found.policy == policy else None

    def get_tenant(self, name: str) -> StoredTenant:
        """See Desk."""
        return self.ledger.tenants.get(name)

    def tenants(self, after: str = "") -> Iterator[StoredTenant]:
        """See Desk; those after a name."""
        while page := self.ledger.tenants.list(after=after, limit=PAGE):
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
        """See Desk. `whole` names what is replaced rather than merged key by key."""

        def act() -> StoredTenant:
            if not changes:
                raise LedgerError("update_mask: names nothing to change, and nothing is given")
            self._known_class(changes.get("class"))
            return self.ledger.tenants.update(name, changes, whole=whole, validate_only=validate_only)

        details = {"fields": _paths(changes)}
        return self._done("tenants.update", f"tenants/{name}", name, reason, act, details=details, quiet=validate_only)

    def suspend_tenant(self, name: str, suspended: bool, *, reason: str = "") -> StoredTenant:
        """See Desk."""
        action = "tenants.suspend" if suspended else "tenants.resume"
        if suspended:
            require_reason(reason)
        return self._done(action, f"tenants/{name}", name, reason, lambda: self.ledger.tenants.suspend(name, suspended))

    def delete_tenant(self, name: str, *, erase: bool = False, reason: str = "", validate_only: bool = False) -> int:
        """See Desk."""
        require_reason(reason)
        if erase:
            # who erased and why stays; whose name it was does not
            from cluster.ledger.tenants.tenants import digest_of_name

            mark, told = f"tenants/{digest_of_name(name)[:16]}", reason.replace(name, "…")
            tenants = self.ledger.tenants
            return self._done(
                "tenants.erase", mark, "", told, lambda: tenants.erase(name, validate_only=validate_only),
                quiet=validate_only,
            )  # fmt: skip

        def act() -> int:
            self.ledger.tenants.delete(name, validate_only=validate_only)
            return 0

        return self._done("tenants.delete", f"tenants/{name}", name, reason, act, quiet=validate_only)

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
        """See Desk. With `request_id` asking twice makes no second key."""

        def act() -> NewKey:
            self._require_grant(role)
            return self.ledger.keys.create(
                tenant, name, expires_at=expires_at, role=role, request_id=request_id, validate_only=validate_only
            )

        return self._done(
            "keys.create",
            f"tenants/{tenant}/keys/",
            tenant,
            reason,
            act,
            details={"key_role": role},
            quiet=validate_only,
        )

    def keys(self, tenant: str) -> list[StoredKey]:
        """See Desk."""
        return self.ledger.keys.list(tenant)

    def rotate_key(
        self, tenant: str, key_id: str, *, overlap_s: float, expires_at: float | None = None, reason: str = ""
    ) -> NewKey:
        """See Desk."""

        def act() -> NewKey:
            self._require_grant(self.ledger.keys.get(tenant, key_id).role)
            return self.ledger.keys.rotate(tenant, key_id, overlap_s=overlap_s, expires_at=expires_at)

        return self._done("keys.rotate", f"tenants/{tenant}/keys/{key_id}", tenant, reason, act)

    def revoke_key(self, tenant: str, key_id: str, *, reason: str = "") -> StoredKey:
        """See Desk."""
        require_reason(reason)

        def act() -> StoredKey:
            self._require_grant(self.ledger.keys.get(tenant, key_id).role)
            return self.ledger.keys.revoke(tenant, key_id)

        return self._done("keys.revoke", f"tenants/{tenant}/keys/{key_id}", tenant, reason, act)

    def _require_grant(self, role: str) -> None:
        if not self._may_grant(role):
            raise NotPermitted(f"who asks has no say in keys of the role {role[:32]!r}")

    # ---- usage and audit

    def usage(self, wanted: UsageQuery, rates: Prices | None = None, *, cost: bool = False) -> list[dict[str, Any]]:
        """See Desk."""
        rates = rates or self._rates
        if cost and rates is None:
            raise LedgerError("cost: there are no rates: set the configuration's cost section")
        return self.ledger.usage.query(wanted, rates if cost else None)

    def records(self, wanted: UsageQuery) -> Iterator[UsageRecord]:
        """See Desk."""
        after = None
        while page := self.ledger.usage.records(wanted, after=after, limit=PAGE):
            yield from page
            after = (page[-1].opened_at_s, page[-1].record_id)

    def audit(
        self, *, tenant: str = "", equal: Mapping[str, str] | None = None, since_s: float = 0.0
    ) -> Iterator[dict[str, Any]]:
        """See Desk."""
        before = None
        while page := self.ledger.audit.list(tenant=tenant, equal=equal, since_s=since_s, before=before, limit=PAGE):
            yield from page
            before = (page[-1]["at_s"], page[-1]["event_id"])

    # ---- each act

    def _done(
        self,
        action: str,
        name: str,
        tenant: str,
        reason: str,
        act: Callable[[], T],
        *,
        details: Mapping[str, Any] | None = None,
        quiet: bool = False,
    ) -> T:
        """Act, and audit what became of it; `quiet`: nothing was to change."""
        outcome, made = "internal", None
        try:
            made = act()
            outcome = "ok"
            return made
        except PolicyError as error:
            outcome = LedgerError.outcome.value
            raise LedgerError(str(error)) from None
        except LedgerError as error:
            outcome = error.outcome.value
            raise
        finally:
            if not quiet:
                if isinstance(made, NewKey):
                    name = f"tenants/{tenant}/keys/{made.stored.id}" if action == "keys.create" else name
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

    def _checked(self, policy: TenantPolicy) -> TenantPolicy:
        self._known_class(policy.priority_class)
        return policy

    def _known_class(self, name: object) -> None:
        if self._classes and name is not None and name not in self._classes:
            raise LedgerError(f"class: {name!r} is none of {', '.join(sorted(self._classes))}")


def require_reason(reason: str) -> None:
    """Whoever takes something away says why. Raises LedgerError."""
    if not reason.strip():
        raise LedgerError("reason: must say why; it goes to the audit log")


def _paths(changes: Mapping[str, Any]) -> list[str]:
    """The fields that a change names."""
    paths = []
    for name, value in changes.items():
        paths += [f"{name}.{key}" for key in value] if isinstance(value, Mapping) and value else [name]
    return sorted(paths)
