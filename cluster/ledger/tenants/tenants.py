"""Tenants: whole policies by name, each with one origin.

What a file declares is read-only here and replaced as a whole by `declare`; what the API has made is the API's.
A deleted tenant's row stays, removed, while its usage does: the name cannot pass to somebody who would then read it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Engine, Row, delete, insert, select, update

from cluster.ledger.database.changes import insert_or, next_change, rows_vanished
from cluster.ledger.database.connect import reading, writing
from cluster.ledger.database.tables import audit, budget_notices, erased, keys, tenants, usage
from cluster.ledger.errors import AlreadyExists, LedgerError, ManagedByFile, NotFound
from cluster.ledger.rows import StoredTenant
from cluster.policy.tenants.policy import PolicyError, TenantPolicy


def digest_of_name(tenant: str) -> str:
    """What is left of an erased tenant's name."""
    return hashlib.sha256(b"headrace/erased\0" + tenant.encode()).hexdigest()


class Tenants:
    """The table of tenants. Every method is one transaction."""

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
        """Add one. Raises AlreadyExists, also for a deleted one whose usage is still here."""
        now = self._clock()
        with writing(self._engine) as connection:
            number = next_change(connection)
            found = _row(connection, policy.name)
            if found is not None and found.removed_at is not None:
                raise AlreadyExists(
                    f"tenants/{policy.name} was deleted and its usage is still kept: "
                    "choose another name, or erase it first (`tenants delete NAME --erase`)"
                )
            if found is not None:
                raise AlreadyExists(f"tenants/{policy.name} exists already; update it instead")
            row = _values(policy, "api", model_aliases or {}, now, number) | {"created_at": now, "removed_at": None}
            if not validate_only:
                connection.execute(insert(tenants).values(row))
        return StoredTenant(policy, "api", now, now, dict(model_aliases or {}))

    def get(self, name: str) -> StoredTenant:
        """One. Raises NotFound."""
        with reading(self._engine) as connection:
            return _stored(_present(connection, name))

    def list(self, *, after: str = "", limit: int = 1000) -> list[StoredTenant]:
        """In order of name, those after `after`."""
        query = select(tenants).where(tenants.c.name > after, tenants.c.removed_at.is_(None))
        with reading(self._engine) as connection:
            return [_stored(row) for row in connection.execute(query.order_by(tenants.c.name).limit(limit))]

    def update(
        self,
        name: str,
        changes: Mapping[str, Any],
        *,
        whole: Collection[str] = (),
        validate_only: bool = False,
    ) -> StoredTenant:
        """Change fields of the policy, by the configuration's names (`class`, `limits`: null or `{}` takes away).

        `limits`, `retention` and `labels` are merged key by key, where null removes a key, unless `whole` names them.
        Raises LedgerError, NotFound, ManagedByFile.
        """
        if "name" in changes:
            raise LedgerError("name: a tenant keeps its name; create another one")

        def changed(policy: TenantPolicy) -> TenantPolicy:
            now = policy.as_json()
            for key, value in changes.items():
                merged = isinstance(now.get(key), dict) and isinstance(value, Mapping)
                together = {**now[key], **value} if merged and key not in whole else value
                if key == "labels" and merged:
                    together = {k: v for k, v in together.items() if v is not None}
                now[key] = together
            try:
                return TenantPolicy.from_json({k: v for k, v in now.items() if v is not None or k not in changes})
            except PolicyError as error:
                raise LedgerError(str(error)) from None

        return self._change(name, changed, validate_only=validate_only)

    def suspend(self, name: str, suspended: bool = True) -> StoredTenant:
        """Suspend or resume. Raises NotFound, ManagedByFile."""
        return self._change(name, lambda policy: replace(policy, suspended=suspended))

    def set_model_aliases(self, name: str, model_aliases: Mapping[str, str]) -> StoredTenant:
        """Names that only this tenant has for models. Raises NotFound, ManagedByFile."""
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
            before = _stored(_own(connection, name))
            aliases = before.model_aliases if model_aliases is None else dict(model_aliases)
            policy = change(before.policy)
            values = _values(policy, "api", aliases, now, number)
            if not validate_only:
                connection.execute(update(tenants).where(tenants.c.name == name).values(values))
        return replace(before, policy=policy, model_aliases=aliases, updated_at=now)

    def delete(self, name: str, *, validate_only: bool = False) -> None:
        """Take a tenant away; its keys stop at once, its usage stays. Raises NotFound, ManagedByFile."""
        now = self._clock()
        with writing(self._engine) as connection:
            number = next_change(connection)
            _own(connection, name)
            if validate_only:
                return
            values = {"removed_at": now, "updated_at": now, "changed": number}
            connection.execute(update(tenants).where(tenants.c.name == name).values(values))
            revoked = {"revoked_at": now, "changed": number}
            mine = (keys.c.tenant == name) & keys.c.revoked_at.is_(None)
            connection.execute(update(keys).where(mine).values(revoked))

    def erase(self, name: str, *, validate_only: bool = False) -> int:
        """Remove every row that names a tenant, present or deleted; how many rows went. NotFound, ManagedByFile.

        A digest of the name stays, so that a gateway's late report does not bring the tenant back.
        """
        now = self._clock()
        with writing(self._engine) as connection:
            number = next_change(connection)
            found = _row(connection, name)
            if found is None:
                raise NotFound(f"tenants/{name} does not exist")
            if found.origin == "file" and found.removed_at is None:
                raise ManagedByFile(_declared(name))
            if validate_only:
                return 0
            gone = 0
            for table in (keys, usage, audit, budget_notices):
                gone += connection.execute(delete(table).where(table.c.tenant == name)).rowcount
            gone += connection.execute(delete(tenants).where(tenants.c.name == name)).rowcount
            mark = insert_or(connection, erased).values(digest=digest_of_name(name), erased_at=now)
            connection.execute(mark.on_conflict_do_update(index_elements=["digest"], set_={"erased_at": now}))
            rows_vanished(connection, number)
        return gone

    def declare(self, policies: Sequence[TenantPolicy]) -> None:
        """Make the file's tenants exactly these. One that the API made becomes the file's; those no longer declared
        are removed, and their keys work again if they come back. Changes nothing when nothing differs."""
        now = self._clock()
        wanted = {policy.name: policy for policy in policies}
        with writing(self._engine) as connection:
            here = {row.name: row for row in connection.execute(select(tenants))}
            changed = [p for p in wanted.values() if not _same(here.get(p.name), p)]
            dropped = [
                r.name for r in here.values() if r.origin == "file" and not r.removed_at and r.name not in wanted
            ]
            if not changed and not dropped:
                return
            number = next_change(connection)
            for policy in changed:
                known = here.get(policy.name)
                values = _values(policy, "file", known.model_aliases if known else {}, now, number)
                values |= {"removed_at": None, "created_at": known.created_at if known else now}
                statement = insert_or(connection, tenants).values(values)
                connection.execute(statement.on_conflict_do_update(index_elements=["name"], set_=values))
            if dropped:
                gone = {"removed_at": now, "updated_at": now, "changed": number}
                connection.execute(update(tenants).where(tenants.c.name.in_(dropped)).values(gone))


def _declared(name: str) -> str:
    return f"tenants/{name} is declared in a file and read-only here: change the file and apply it"


def _row(connection: Connection, name: str) -> Row[Any] | None:
    return connection.execute(select(tenants).where(tenants.c.name == name)).one_or_none()


def _present(connection: Connection, name: str) -> Row[Any]:
    found = _row(connection, name)
    if found is None or found.removed_at is not None:
        raise NotFound(f"tenants/{name} does not exist")
    return found


def _own(connection: Connection, name: str) -> Row[Any]:
    found = _present(connection, name)
    if found.origin == "file":
        raise ManagedByFile(_declared(name))
    return found


def _stored(row: Row[Any]) -> StoredTenant:
    return StoredTenant(
        TenantPolicy.from_json(row.policy), row.origin, row.created_at, row.updated_at, dict(row.model_aliases)
    )


def _same(row: Row[Any] | None, policy: TenantPolicy) -> bool:
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
