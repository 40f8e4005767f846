"""A tenant's row that this release cannot use, or that a later release has written, does not stop other tenants."""

from __future__ import annotations

import json
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from structlog.testing import capture_logs

from cluster.ledger import errors
from cluster.ledger.store import Ledger
from cluster.policy.tenants.identity import AccessSnapshot, authenticate
from cluster.policy.tenants.policy import TenantLimits, TenantPolicy
from tests.ledger.conftest import PEPPER

LATER = {"later": None}


def change_policy(database_url: str, tenant: str, **fields: Any) -> dict[str, Any]:
    """Change fields of a stored policy as a gateway of a later release does. Returns the stored policy."""
    engine = create_engine(database_url)
    with engine.begin() as connection:
        stored = connection.execute(
            text("SELECT policy FROM tenants WHERE name = :name"), {"name": tenant}
        ).scalar_one()
        before: dict[str, Any] = json.loads(stored) if isinstance(stored, str) else stored
        policy = {**before, **fields}
        if fields:
            statement = "UPDATE change_sequence SET value = value + 1 RETURNING value"
            number = connection.execute(text(statement)).scalar()
            statement = "UPDATE tenants SET policy = :policy, changed = :number WHERE name = :name"
            values = {"policy": json.dumps(policy), "number": number, "name": tenant}
            connection.execute(text(statement), values)
    engine.dispose()
    return policy


def reason(snapshot: AccessSnapshot, key: str) -> str:
    """Authenticate a key with a snapshot, and return the reason of the result."""
    return authenticate(snapshot, key, (PEPPER,), 0.0).reason


def test_a_row_of_a_later_release_is_used(ledger: Ledger, database_url: str) -> None:
    """A row with unknown fields is read, and a revocation that comes after it takes effect. A change by this release
    keeps the unknown fields."""
    for name in ("acme", "other"):
        ledger.tenants.create(TenantPolicy(name, limits=TenantLimits(daily_tokens=5)))
    key = ledger.keys.create("acme")
    before = ledger.snapshots.read()
    change_policy(database_url, "other", **LATER, limits={"daily_tokens": 5, **LATER})
    ledger.keys.revoke("acme", key.stored.id)
    for earlier in (before, None):
        snapshot = ledger.snapshots.read(earlier)
        assert reason(snapshot, key.secret) == "revoked"
        assert snapshot.tenants["other"].policy == ledger.tenants.get("other").policy
    assert [tenant.policy.name for tenant in ledger.tenants.list()] == ["acme", "other"]
    ledger.tenants.update("other", {"weight": 2.0, "limits": {"daily_tokens": None, "monthly_tokens": 7}})
    stored = change_policy(database_url, "other")
    assert (stored["weight"], stored["later"]) == (2.0, None)
    limits = {name: value for name, value in stored["limits"].items() if value is not None or name == "later"}
    assert limits == {"monthly_tokens": 7, "later": None}


def test_an_unusable_row_concerns_its_tenant_alone(ledger: Ledger, database_url: str) -> None:
    """A tenant whose row cannot be used keeps its previous entry. Without one, the tenant is suspended. Other tenants
    are up to date. Each problem is logged once."""
    for name in ("acme", "other"):
        ledger.tenants.create(TenantPolicy(name, weight=3.0))
    keys = {name: ledger.keys.create(name) for name in ("acme", "other")}
    before = ledger.snapshots.read()
    change_policy(database_url, "other", on_budget="explode")
    ledger.keys.revoke("acme", keys["acme"].stored.id)
    with capture_logs() as logs:
        kept = ledger.snapshots.read(before)
        new = ledger.snapshots.read()
        ledger.snapshots.read()
    assert [(entry["event"], entry["tenant"]) for entry in logs] == [("ledger.tenant_not_read", "other")]
    assert (reason(kept, keys["acme"].secret), reason(new, keys["acme"].secret)) == ("revoked", "revoked")
    assert (reason(kept, keys["other"].secret), kept.tenants["other"].policy.weight) == ("ok", 3.0)
    assert reason(new, keys["other"].secret) == "suspended"
    assert [(tenant.policy.name, tenant.policy.suspended) for tenant in ledger.tenants.list()] == [
        ("acme", False),
        ("other", True),
    ]
    with pytest.raises(errors.LedgerError, match="on_budget"):
        ledger.tenants.update("other", {"weight": 2.0})
    change_policy(database_url, "other", on_budget="stop")
    assert reason(ledger.snapshots.read(new), keys["other"].secret) == "ok"
    ledger.tenants.delete("other")
    assert "other" not in ledger.snapshots.read().tenants
