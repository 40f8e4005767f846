"""The table of tenants. Each tenant has a policy and an origin, `file` or `api`.

Tenants that are declared in the configuration file have the origin `file` and are read-only here; only `declare`
replaces their policies. The row of a deleted tenant stays and is marked as removed. The row keeps the name reserved, so
that no new tenant with that name can read the deleted tenant's usage.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Engine, Row, delete, insert, select, update

from cluster.ledger.database.changes import dialect_insert, next_change, require_reload
from cluster.ledger.database.connect import reading, writing
from cluster.ledger.database.tables import audit, budget_notices, erased, keys, tenants, usage
from cluster.ledger.errors import AlreadyExists, LedgerError, ManagedByFile, NotFound
from cluster.ledger.rows import StoredTenant
from cluster.policy.tenants.policy import PolicyError, TenantPolicy


def digest_of_name(tenant: str) -> str:
    """Return the digest of a tenant's name. After a tenant is erased, only this digest is kept."""
    return hashlib.sha256(b"headrace/erased\0" + tenant.encode()).hexdigest()


class Tenants:
    """The table of tenants. Every method runs in one transaction."""

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._clock = clock

    def create(
        self,
        policy: TenantPolicy,
        *,
        model_aliases: Mapping[str, str] | None = None,
        validate_only: bool = False,
    ) -> StoredTenant:
        """Create a tenant.

        Raises AlreadyExists if a tenant has this name, even if that tenant was deleted and only its usage is kept.
        """
        now = self._clock()
        with writing(self._engine) as connection:
            number = next_change(connection)
            existing = _row(connection, policy.name)
            if existing is not None and existing.removed_at is not None:
                raise AlreadyExists(
                    f"tenants/{policy.name} was deleted and its usage is still kept: bring it back "
                    "(`tenants undelete NAME`), choose another name, or erase it first (`tenants delete NAME --erase`)"
                )
            if existing is not None:
                raise AlreadyExists(f"tenants/{policy.name} exists already; update it instead")
            row = _values(policy, "api", model_aliases or {}, now, number) | {"created_at": now, "removed_at": None}
            if not validate_only:
                connection.execute(insert(tenants).values(row))
        return StoredTenant(policy, "api", now, now, dict(model_aliases or {}))

    def get(self, name: str) -> StoredTenant:
        """Return the tenant with the given name. Raises NotFound.

        A tenant whose row cannot be used is returned as a suspended one, as in `list`.
        """
        with reading(self._engine) as connection:
            tenant = _stored_or_suspended(_existing_row(connection, name))
        if tenant is None:
            raise NotFound(f"tenants/{name} is stored under a name that this release does not allow")
        return tenant

    def list(self, *, after: str = "", limit: int = 1000) -> list[StoredTenant]:
        """Return at most `limit` tenants in order of name, beginning after the name `after`.

        A tenant whose row cannot be used is listed as a suspended one.
        """
        query = select(tenants).where(tenants.c.name > after, tenants.c.removed_at.is_(None))
        with reading(self._engine) as connection:
            rows = connection.execute(query.order_by(tenants.c.name).limit(limit)).all()
        return [tenant for tenant in map(_stored_or_suspended, rows) if tenant is not None]

    def update(
        self,
        name: str,
        changes: Mapping[str, Any],
        *,
        whole: Collection[str] = (),
        validate_only: bool = False,
    ) -> StoredTenant:
        """Change fields of a tenant's policy. Raises LedgerError, NotFound, ManagedByFile.

        Fields have the configuration's names, e.g. `class` and `limits`. A field is removed by the value null. The
        fields `limits`, `retention` and `labels` are merged key by key, and a key is removed by the value null. A field
        that is named in `whole` is replaced instead of merged.
        """
        if "name" in changes:
            raise LedgerError("name: a tenant cannot be renamed; create another one")

        def changed(policy: TenantPolicy) -> TenantPolicy:
            fields = policy.as_json()
            for key, value in changes.items():
                are_maps = isinstance(fields.get(key), dict) and isinstance(value, Mapping)
                merged = {**fields[key], **value} if are_maps and key not in whole else value
                if key == "labels" and are_maps:
                    merged = {k: v for k, v in merged.items() if v is not None}
                fields[key] = merged
            try:
                return TenantPolicy.from_json({k: v for k, v in fields.items() if v is not None or k not in changes})
            except PolicyError as error:
                raise LedgerError(str(error)) from None

        return self._change(name, changed, validate_only=validate_only)

    def suspend(self, name: str, suspended: bool = True) -> StoredTenant:
        """Suspend or resume a tenant. Raises NotFound, ManagedByFile."""
        return self._change(name, lambda policy: replace(policy, suspended=suspended))

    def set_model_aliases(self, name: str, model_aliases: Mapping[str, str]) -> StoredTenant:
        """Set a tenant's model aliases, which are valid for this tenant only. Raises NotFound, ManagedByFile."""
        return self._change(name, lambda policy: policy, model_aliases)

    def _change(
        self,
        name: str,
        change: Callable[[TenantPolicy], TenantPolicy],
        model_aliases: Mapping[str, str] | None = None,
        *,
        validate_only: bool = False,
    ) -> StoredTenant:
        now = self._clock()
        with writing(self._engine) as connection:
            number = next_change(connection)
            row = _api_row(connection, name)
            try:
                before = _stored(row)
            except (TypeError, ValueError) as error:
                raise LedgerError(
                    f"tenants/{name}: this release cannot use the stored policy: {error}; "
                    "change the tenant with the release that wrote it, or delete it"
                ) from None
            aliases = before.model_aliases if model_aliases is None else dict(model_aliases)
            policy = change(before.policy)
            values = _values(policy, "api", aliases, now, number)
            values["policy"] = _with_unknown_fields(row.policy, values["policy"])
            if not validate_only:
                connection.execute(update(tenants).where(tenants.c.name == name).values(values))
        return replace(before, policy=policy, model_aliases=aliases, updated_at=now)

    def delete(self, name: str, *, validate_only: bool = False) -> None:
        """Delete a tenant and revoke the tenant's keys. The tenant's usage stays, and `undelete` undoes it. Raises
        NotFound, ManagedByFile."""
        now = self._clock()
        with writing(self._engine) as connection:
            number = next_change(connection)
            _api_row(connection, name)
            if validate_only:
                return
            values = {"removed_at": now, "updated_at": now, "changed": number}
            connection.execute(update(tenants).where(tenants.c.name == name).values(values))
            revoked = {"revoked_at": now, "changed": number}
            mine = (keys.c.tenant == name) & keys.c.revoked_at.is_(None)
            connection.execute(update(keys).where(mine).values(revoked))

    def undelete(self, name: str) -> StoredTenant:
        """Bring a deleted tenant back, with its policy and with the keys that its deletion has revoked.

        Raises NotFound if it was erased or never existed, ManagedByFile, AlreadyExists if it is not deleted.
        """
        now = self._clock()
        with writing(self._engine) as connection:
            number = next_change(connection)
            row = _row(connection, name)
            if row is None:
                raise NotFound(f"tenants/{name} does not exist; an erased tenant cannot come back")
            if row.removed_at is None:
                raise AlreadyExists(f"tenants/{name} is not deleted")
            if row.origin == "file":
                raise ManagedByFile(f"tenants/{name} was declared in a file: declare it there again and apply the file")
            values = {"removed_at": None, "updated_at": now, "changed": number}
            connection.execute(update(tenants).where(tenants.c.name == name).values(values))
            of_deletion = (keys.c.tenant == name) & (keys.c.revoked_at == row.removed_at)
            connection.execute(update(keys).where(of_deletion).values({"revoked_at": None, "changed": number}))
        return self.get(name)

    def erase(self, name: str, *, validate_only: bool = False) -> int:
        """Remove every row that names a tenant. Returns the number of rows removed. Raises NotFound, ManagedByFile.

        The tenant may be deleted already. A digest of the tenant's name is kept, so that late usage records from
        gateways are dropped.
        """
        now = self._clock()
        with writing(self._engine) as connection:
            number = next_change(connection)
            existing = _row(connection, name)
            if existing is None:
                raise NotFound(f"tenants/{name} does not exist")
            if existing.origin == "file" and existing.removed_at is None:
                raise ManagedByFile(_read_only_message(name))
            if validate_only:
                return 0
            removed = 0
            for table in (keys, usage, audit, budget_notices):
                removed += connection.execute(delete(table).where(table.c.tenant == name)).rowcount
            removed += connection.execute(delete(tenants).where(tenants.c.name == name)).rowcount
            digest_row = dialect_insert(connection, erased).values(digest=digest_of_name(name), erased_at=now)
            connection.execute(digest_row.on_conflict_do_update(index_elements=["digest"], set_={"erased_at": now}))
            require_reload(connection, number)
        return removed

    def declare(self, policies: Sequence[TenantPolicy]) -> None:
        """Make `policies` the tenants of the configuration file. Writes nothing if no policy differs.

        A tenant with origin `api` and a declared name gets the origin `file`. Tenants that are no longer declared are
        marked as removed. If a removed tenant is declared again, the tenant's keys work again.
        """
        now = self._clock()
        declared = {policy.name: policy for policy in policies}
        with writing(self._engine) as connection:
            stored = {row.name: row for row in connection.execute(select(tenants))}
            changed = [p for p in declared.values() if not _is_declared_as(stored.get(p.name), p)]
            dropped = [
                r.name for r in stored.values() if r.origin == "file" and not r.removed_at and r.name not in declared
            ]
            if not changed and not dropped:
                return
            number = next_change(connection)
            for policy in changed:
                current = stored.get(policy.name)
                values = _values(policy, "file", current.model_aliases if current else {}, now, number)
                values |= {"removed_at": None, "created_at": current.created_at if current else now}
                statement = dialect_insert(connection, tenants).values(values)
                connection.execute(statement.on_conflict_do_update(index_elements=["name"], set_=values))
            if dropped:
                removed = {"removed_at": now, "updated_at": now, "changed": number}
                connection.execute(update(tenants).where(tenants.c.name.in_(dropped)).values(removed))


def _read_only_message(name: str) -> str:
    return f"tenants/{name} is declared in a file and read-only here: change the file and apply it"


def _row(connection: Connection, name: str) -> Row[Any] | None:
    return connection.execute(select(tenants).where(tenants.c.name == name)).one_or_none()


def _existing_row(connection: Connection, name: str) -> Row[Any]:
    existing = _row(connection, name)
    if existing is None or existing.removed_at is not None:
        raise NotFound(f"tenants/{name} does not exist")
    return existing


def _api_row(connection: Connection, name: str) -> Row[Any]:
    existing = _existing_row(connection, name)
    if existing.origin == "file":
        raise ManagedByFile(_read_only_message(name))
    return existing


def _stored(row: Row[Any]) -> StoredTenant:
    """Return the tenant of a row. Raises TypeError, ValueError for a row that this release cannot use."""
    return StoredTenant(
        TenantPolicy.from_stored(row.policy), row.origin, row.created_at, row.updated_at, dict(row.model_aliases)
    )


def _stored_or_suspended(row: Row[Any]) -> StoredTenant | None:
    """Return the tenant of a row, suspended if the row cannot be used; None if the name is invalid too."""
    with contextlib.suppress(TypeError, ValueError):
        return _stored(row)
    with contextlib.suppress(PolicyError):
        policy = TenantPolicy.suspended_in_place_of(row.name, row.policy)
        return StoredTenant(policy, row.origin, row.created_at, row.updated_at, {})
    return None


def _with_unknown_fields(stored: Mapping[str, Any], policy: Mapping[str, Any]) -> dict[str, Any]:
    """Return a policy's plain values, with those fields of the stored policy that only a later release knows."""
    merged = {**stored, **policy}
    for name in ("limits", "retention"):
        merged[name] = {**stored.get(name, {}), **policy[name]}
    return merged


def _is_declared_as(row: Row[Any] | None, policy: TenantPolicy) -> bool:
    return row is not None and (row.origin, row.removed_at, row.policy) == ("file", None, policy.as_json())


def _values(
    policy: TenantPolicy, origin: str, model_aliases: Mapping[str, str], now: float, number: int
) -> dict[str, Any]:
    return {
        "name": policy.name,
        "policy": replace(policy, handle="").as_json(),
        "origin": origin,
        "model_aliases": dict(model_aliases),
        "updated_at": now,
        "changed": number,
    }
