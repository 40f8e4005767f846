"""The table of API keys. A new key is returned once, at its creation. Only the key's peppered digest is stored."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, Engine, Row, insert, select, update

from cluster.ledger.database.changes import next_change
from cluster.ledger.database.connect import reading, writing
from cluster.ledger.database.tables import keys, tenants
from cluster.ledger.errors import AlreadyExists, LedgerError, NotFound
from cluster.ledger.rows import NewKey, StoredKey
from cluster.policy.tenants.identity import ROLES, SECRET_BYTES, derive, digest_of, make_key, sha256_of

MAX_NAME = 255
_ID_BYTES = 6


class Keys:
    """The table of API keys. Every method runs in one transaction."""

    def __init__(self, engine: Engine, clock: Callable[[], float], peppers: tuple[bytes, ...]) -> None:
        self._engine = engine
        self._clock = clock
        self._peppers = peppers

    def create(
        self,
        tenant: str,
        name: str = "",
        *,
        expires_at: float | None = None,
        role: str = "caller",
        request_id: str = "",
        validate_only: bool = False,
    ) -> NewKey:
        """Create a key for a tenant. Raises LedgerError, NotFound, AlreadyExists.

        With `request_id`, the key's id is derived from `request_id`, so that a repeated request creates no second key.
        """
        key_id = _new_id() if not request_id else self._derived_id(tenant, request_id)
        with writing(self._engine) as connection:
            number = next_change(connection)
            if validate_only:
                now = self._clock()
                _require_tenant(connection, tenant)
                self._check(name, expires_at, role, now)
                return NewKey(StoredKey("", tenant, name, role, now, expires_at), "")
            if connection.execute(select(keys.c.id).where(keys.c.id == key_id)).first() is not None:
                raise AlreadyExists(
                    f"tenants/{tenant}/keys/{key_id} was already created with this request_id: "
                    "rotate it if the key was lost, or send another request_id"
                )
            return self._add(connection, number, tenant, name, expires_at, role, "", key_id)

    def _derived_id(self, tenant: str, request_id: str) -> str:
        return "k" + derive(self._pepper(), "key-request", tenant, request_id)[:_ID_BYTES].hex()

    def import_hash(
        self,
        tenant: str,
        sha256_hex: str,
        *,
        name: str = "",
        expires_at: float | None = None,
        revoked: bool = False,
    ) -> StoredKey:
        """Store a key, given only the key's SHA-256. Raises LedgerError, NotFound, AlreadyExists."""
        try:
            inner = bytes.fromhex(sha256_hex)
        except ValueError:
            inner = b""
        if len(inner) != 32:
            raise LedgerError("sha256: must be the 64 hex digits of a SHA-256")
        with writing(self._engine) as connection:
            number = next_change(connection)
            return self._insert(connection, number, tenant, name, expires_at, "caller", "", _new_id(), inner, revoked)

    def list(self, tenant: str) -> list[StoredKey]:
        """Return a tenant's keys, including revoked keys, oldest first. Raises NotFound."""
        with reading(self._engine) as connection:
            _require_tenant(connection, tenant)
            query = select(keys).where(keys.c.tenant == tenant).order_by(keys.c.created_at, keys.c.id)
            return [_stored(row) for row in connection.execute(query)]

    def get(self, tenant: str, key_id: str) -> StoredKey:
        """Return a key of a tenant. Raises NotFound if the tenant has no key with this id, even if another tenant has
        one."""
        with reading(self._engine) as connection:
            return _stored(_row(connection, tenant, key_id))

    def rotate(self, tenant: str, key_id: str, *, overlap_s: float, expires_at: float | None = None) -> NewKey:
        """Create a successor of a key, with the same name and role. Raises LedgerError, NotFound.

        The old key stays valid for `overlap_s` more seconds, at most until the old key's own expiry.
        """
        if not 0 <= overlap_s <= 366 * 86400:
            raise LedgerError("overlap_s: must be between 0 and 366 days")
        now = self._clock()
        with writing(self._engine) as connection:
            number = next_change(connection)
            old = _row(connection, tenant, key_id)
            if old.revoked_at is not None or (old.expires_at is not None and old.expires_at <= now):
                raise LedgerError(f"tenants/{tenant}/keys/{key_id} is revoked or expired: create a new key instead")
            old_expires_at = now + overlap_s if old.expires_at is None else min(old.expires_at, now + overlap_s)
            values = {"expires_at": old_expires_at, "changed": number}
            connection.execute(update(keys).where(keys.c.id == key_id).values(values))
            return self._add(connection, number, tenant, old.name, expires_at, old.role, key_id, _new_id())

    def revoke(self, tenant: str, key_id: str) -> StoredKey:
        """Revoke a key immediately. A repeated call changes nothing. Raises NotFound."""
        with writing(self._engine) as connection:
            number = next_change(connection)
            if _row(connection, tenant, key_id).revoked_at is None:
                values = {"revoked_at": self._clock(), "changed": number}
                connection.execute(update(keys).where(keys.c.id == key_id).values(values))
            return _stored(_row(connection, tenant, key_id))

    def _add(
        self,
        connection: Connection,
        number: int,
        tenant: str,
        name: str,
        expires_at: float | None,
        role: str,
        rotated_from: str,
        key_id: str,
    ) -> NewKey:
        secret = make_key(key_id, secrets.token_bytes(SECRET_BYTES))
        inner = sha256_of(secret)
        stored = self._insert(connection, number, tenant, name, expires_at, role, rotated_from, key_id, inner, False)
        return NewKey(stored, secret)

    def _insert(
        self,
        connection: Connection,
        number: int,
        tenant: str,
        name: str,
        expires_at: float | None,
        role: str,
        rotated_from: str,
        key_id: str,
        inner: bytes,
        revoked: bool,
    ) -> StoredKey:
        now = self._clock()
        _require_tenant(connection, tenant)
        self._check(name, expires_at, role, now)
        digest = digest_of(inner, self._pepper()).hex()
        if connection.execute(select(keys.c.id).where(keys.c.digest == digest)).first() is not None:
            raise AlreadyExists("this key exists already")
        row = {
            "id": key_id,
            "tenant": tenant,
            "name": name,
            "digest": digest,
            "role": role,
            "created_at": now,
            "expires_at": expires_at,
            "revoked_at": now if revoked else None,
            "rotated_from": rotated_from,
            "changed": number,
        }
        connection.execute(insert(keys).values(row))
        return StoredKey(key_id, tenant, name, role, now, expires_at, row["revoked_at"], rotated_from)  # type: ignore[arg-type]

    def _pepper(self) -> bytes:
        if not self._peppers:
            raise LedgerError("auth.api_keys.pepper_file: not set: keys cannot be stored without a pepper; set it")
        return self._peppers[0]

    @staticmethod
    def _check(name: str, expires_at: float | None, role: str, now: float) -> None:
        if len(name) > MAX_NAME or not name.isprintable():
            raise LedgerError(f"name: must be at most {MAX_NAME} printable characters")
        if role not in ROLES:
            raise LedgerError(f"role: must be one of {', '.join(ROLES)}, not {role!r}")
        if expires_at is not None and not now < expires_at < now + 100 * 366 * 86400:
            raise LedgerError("expires_at: must be in the future, within a hundred years")


def _new_id() -> str:
    return "k" + secrets.token_hex(_ID_BYTES)


def _require_tenant(connection: Connection, tenant: str) -> None:
    query = select(tenants.c.name).where(tenants.c.name == tenant, tenants.c.removed_at.is_(None))
    if connection.execute(query).first() is None:
        raise NotFound(f"tenants/{tenant} does not exist")


def _row(connection: Connection, tenant: str, key_id: str) -> Row[Any]:
    row = connection.execute(select(keys).where(keys.c.id == key_id, keys.c.tenant == tenant)).one_or_none()
    if row is None:
        raise NotFound(f"tenants/{tenant}/keys/{key_id} does not exist")
    return row


def _stored(row: Row[Any]) -> StoredKey:
    return StoredKey(
        row.id, row.tenant, row.name, row.role, row.created_at, row.expires_at, row.revoked_at, row.rotated_from
    )
