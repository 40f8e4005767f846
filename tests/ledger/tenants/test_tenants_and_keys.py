"""Operations on tenants and keys have the same results on SQLite and PostgreSQL."""

from __future__ import annotations

import hashlib
import threading

import pytest

from cluster.ledger import errors
from cluster.ledger.audit.audit import AuditEvent
from cluster.ledger.rows import UsageQuery
from cluster.ledger.store import Ledger
from cluster.ledger.usage.records import UsageRecord
from cluster.policy.tenants.identity import AccessSnapshot, authenticate
from cluster.policy.tenants.policy import TenantLimits, TenantPolicy
from tests.ledger.conftest import PEPPER

pytestmark = pytest.mark.slow

ACME = TenantPolicy(
    "acme", weight=4.0, limits=TenantLimits(tokens_per_minute=4_000_000), labels={"cost_center": "4711", "ü": "'\"%"}
)


def reason(snapshot: AccessSnapshot, key: str, now_s: float = 0.0) -> str:
    """Authenticate a key with a snapshot, and return the reason of the result."""
    return authenticate(snapshot, key, (PEPPER,), now_s).reason


def test_a_policy_rests_whole(ledger: Ledger) -> None:
    """A stored tenant has all fields with which it was created. Lists of tenants are sorted and paged."""
    ledger.tenants.create(ACME, model_aliases={"gpt-4o": "tiny"})
    ledger.tenants.create(TenantPolicy("b"))
    stored = ledger.tenants.get("acme")
    assert (stored.policy, stored.origin, stored.model_aliases) == (ACME, "api", {"gpt-4o": "tiny"})
    assert [tenant.policy.name for tenant in ledger.tenants.list()] == ["acme", "b"]
    assert [tenant.policy.name for tenant in ledger.tenants.list(after="acme", limit=1)] == ["b"]
    with pytest.raises(errors.AlreadyExists, match="acme"):
        ledger.tenants.create(ACME)
    with pytest.raises(errors.NotFound, match="tenants/nobody"):
        ledger.tenants.get("nobody")


def test_updates_name_their_fields(ledger: Ledger) -> None:
    """An update merges maps, and null removes a value.

    An invalid field raises an error with the field's path, and the tenant is not changed.
    """
    ledger.tenants.create(ACME)
    changed = ledger.tenants.update(
        "acme",
        {"class": "batch", "limits": {"requests_per_minute": 5, "tokens_per_minute": None}, "labels": {"ü": None}},
    ).policy
    assert (changed.priority_class, changed.weight) == ("batch", 4.0)
    assert (changed.limits.requests_per_minute, changed.limits.tokens_per_minute) == (5, None)
    assert changed.labels == {"cost_center": "4711"}
    for wrong, path in (
        ({"limits": {"requests_per_minute": 0}}, "limits.requests_per_minute"),
        ({"limits": {"tokens_per_minute": -1}}, "limits.tokens_per_minute"),
        ({"limits": {"daily_tokens": 10**40}}, "limits.daily_tokens"),
        ({"weight": 0}, "weight"),
        ({"wieght": 1.0}, "wieght"),
        ({"name": "other"}, "name"),
    ):
        with pytest.raises(errors.LedgerError, match=path):
            ledger.tenants.update("acme", wrong)
    assert ledger.tenants.get("acme").policy == changed


def test_what_a_file_declares_is_read_only(ledger: Ledger) -> None:
    """Every change to a tenant of the configuration file raises ManagedByFile, but keys of that tenant can be
    created."""
    ledger.tenants.declare([TenantPolicy("acme")])
    for change in (
        lambda: ledger.tenants.update("acme", {"weight": 2.0}),
        lambda: ledger.tenants.suspend("acme"),
        lambda: ledger.tenants.delete("acme"),
        lambda: ledger.erase("acme"),
        lambda: ledger.tenants.set_model_aliases("acme", {"a": "b"}),
    ):
        with pytest.raises(errors.ManagedByFile, match="declared in a file"):
            change()
    assert ledger.keys.create("acme").stored.tenant == "acme"
    assert ledger.tenants.get("acme").origin == "file"


def test_declaring_makes_the_files_tenants_exactly_these(ledger: Ledger) -> None:
    """If a tenant is removed from the configuration file and declared again, it has the same keys. Tenants that
    were created over the API are not removed.

    Declaring the same tenants again does not increment the change sequence.
    """
    ledger.tenants.create(TenantPolicy("api"))
    ledger.tenants.declare([TenantPolicy("a"), TenantPolicy("b")])
    key = ledger.keys.create("b").secret
    before = ledger.snapshots.read()
    ledger.tenants.declare([TenantPolicy("b"), TenantPolicy("a")])
    assert ledger.snapshots.read(before).sequence == before.sequence
    ledger.tenants.declare([TenantPolicy("a", weight=2.0)])
    without = ledger.snapshots.read(before)
    assert set(without.tenants) == {"a", "api"}
    assert without.tenants["a"].policy.weight == 2.0
    assert reason(without, key) == "unknown"
    ledger.tenants.declare([TenantPolicy("a"), TenantPolicy("b")])
    assert reason(ledger.snapshots.read(without), key) == "ok"


def test_a_key_is_shown_once_and_kept_as_a_digest(ledger: Ledger, database_url: str) -> None:
    """The database contains neither a key nor the key's plain hash, and the repr of a new key does not show the key."""
    ledger.tenants.create(ACME)
    created = ledger.keys.create("acme", "ci")
    assert created.secret.startswith(f"hr_{created.stored.id}_")
    assert created.secret not in repr(created)
    (stored,) = ledger.keys.list("acme")
    assert (stored.id, stored.name, stored.role) == (created.stored.id, "ci", "caller")
    (entry,) = ledger.snapshots.read().keys.values()
    assert entry.digest != hashlib.sha256(created.secret.encode()).digest()
    if database_url.startswith("sqlite"):
        raw = b"".join(open(database_url[10:] + end, "rb").read() for end in ("", "-wal"))  # noqa: SIM115
        assert created.secret[-20:].encode() not in raw
        assert hashlib.sha256(created.secret.encode()).hexdigest().encode() not in raw


def test_rotation_without_downtime(database_url: str) -> None:
    """The old key and the new key work during the overlap, and afterwards only the new key works.

    An expired key cannot be rotated.
    """
    now = [1000.0]
    ledger = Ledger(database_url, peppers=(PEPPER,), clock=lambda: now[0])
    ledger.upgrade()
    ledger.tenants.create(ACME)
    old = ledger.keys.create("acme", "ci", role="viewer")
    new = ledger.keys.rotate("acme", old.stored.id, overlap_s=60)
    assert (new.stored.name, new.stored.role, new.stored.rotated_from) == ("ci", "viewer", old.stored.id)
    snapshot = ledger.snapshots.read()
    assert [reason(snapshot, key.secret, 1059) for key in (old, new)] == ["ok", "ok"]
    assert [reason(snapshot, key.secret, 1060) for key in (old, new)] == ["expired", "ok"]
    now[0] = 2000.0
    with pytest.raises(errors.LedgerError, match="create a new key"):
        ledger.keys.rotate("acme", old.stored.id, overlap_s=60)
    ledger.close()


def test_keys_of_others_are_not_found(ledger: Ledger) -> None:
    """An operation on another tenant's key raises the same error as an operation on a key that does not exist."""
    ledger.tenants.create(ACME)
    ledger.tenants.create(TenantPolicy("b"))
    key = ledger.keys.create("acme").stored.id
    for act in (ledger.keys.get, ledger.keys.revoke, lambda t, k: ledger.keys.rotate(t, k, overlap_s=0)):
        with pytest.raises(errors.NotFound, match=f"tenants/b/keys/{key} does not exist"):
            act("b", key)
    assert ledger.keys.get("acme", key).revoked_at is None


def test_bad_keys_are_refused_with_the_field(ledger: Ledger) -> None:
    """The error for an invalid name, role, expiry, hash or overlap of a key names the field."""
    ledger.tenants.create(ACME)
    for make, word in (
        (lambda: ledger.keys.create("acme", "x" * 256), "name"),
        (lambda: ledger.keys.create("acme", "a\nb"), "name"),
        (lambda: ledger.keys.create("acme", role="root"), "role"),
        (lambda: ledger.keys.create("acme", expires_at=1.0), "expires_at"),
        (lambda: ledger.keys.create("acme", expires_at=1e18), "expires_at"),
        (lambda: ledger.keys.import_hash("acme", "zz"), "sha256"),
        (lambda: ledger.keys.rotate("acme", "k", overlap_s=-1), "overlap_s"),
    ):
        with pytest.raises(errors.LedgerError, match=word):
            make()
    assert ledger.keys.list("acme") == []


def test_no_pepper_no_keys(database_url: str) -> None:
    """Creating a key without a pepper raises an error that names the setting `pepper_file`."""
    ledger = Ledger(database_url)
    ledger.upgrade()
    ledger.tenants.create(ACME)
    with pytest.raises(errors.LedgerError, match="pepper_file"):
        ledger.keys.create("acme")
    ledger.close()


def test_snapshots_follow_every_change(ledger: Ledger) -> None:
    """An incremental read of a snapshot equals a full read after each kind of change."""
    snapshot = ledger.snapshots.read()
    keys: list[str] = []

    def create_key() -> None:
        created = ledger.keys.create("acme")
        keys.append(created.stored.id)

    for change in (
        lambda: ledger.tenants.create(ACME),
        create_key,
        create_key,
        lambda: ledger.tenants.create(TenantPolicy("b")),
        lambda: ledger.tenants.suspend("acme"),
        lambda: ledger.tenants.suspend("acme", False),
        lambda: ledger.keys.revoke("acme", keys[0]),
        lambda: ledger.keys.import_hash("b", "ab" * 32),
        lambda: ledger.tenants.update("acme", {"weight": 2.5}),
        lambda: ledger.tenants.delete("b"),
        lambda: ledger.erase("b"),
        lambda: ledger.tenants.create(TenantPolicy("b")),
        lambda: ledger.erase("acme"),
    ):
        change()
        after = ledger.snapshots.read(snapshot)
        full = ledger.snapshots.read()
        assert after.sequence == snapshot.sequence + 1
        assert (after.tenants, after.keys) == (full.tenants, full.keys)
        snapshot = after
    assert set(snapshot.tenants) == {"b"}
    assert snapshot.keys == {}


def test_a_change_that_commits_late_is_not_missed(ledger: Ledger) -> None:
    """A reader that has change number n has read every change up to n, even while several threads write."""
    created: list[str] = []

    def write(prefix: str) -> None:
        for at in range(15):
            ledger.tenants.create(TenantPolicy(f"{prefix}{at}"))
            created.append(f"{prefix}{at}")

    threads = [threading.Thread(target=write, args=(prefix,)) for prefix in "abc"]
    for thread in threads:
        thread.start()
    snapshot = ledger.snapshots.read()
    while any(thread.is_alive() for thread in threads):
        done = set(created)
        snapshot = ledger.snapshots.read(snapshot)
        assert done <= snapshot.tenants.keys()
        assert len(snapshot.tenants) == snapshot.sequence - 1
    assert len(ledger.snapshots.read(snapshot).tenants) == 45


def test_a_deleted_tenant_comes_back(ledger: Ledger) -> None:
    """An undeleted tenant has the policy and the keys that it had when it was deleted. A key that was revoked before
    stays revoked. An erased tenant does not come back."""
    ledger.tenants.create(ACME)
    kept, revoked = ledger.keys.create("acme"), ledger.keys.create("acme")
    ledger.keys.revoke("acme", revoked.stored.id)
    snapshot = ledger.snapshots.read(None)
    ledger.tenants.delete("acme")
    snapshot = ledger.snapshots.read(snapshot)
    assert reason(snapshot, kept.secret) == "unknown"
    assert ledger.tenants.undelete("acme").policy == ACME
    snapshot = ledger.snapshots.read(snapshot)
    assert [reason(snapshot, key.secret) for key in (kept, revoked)] == ["ok", "revoked"]
    with pytest.raises(errors.AlreadyExists, match="not deleted"):
        ledger.tenants.undelete("acme")
    ledger.tenants.erase("acme")
    with pytest.raises(errors.NotFound, match="erased"):
        ledger.tenants.undelete("acme")


def test_a_deleted_name_passes_to_nobody_until_erased(ledger: Ledger) -> None:
    """Deleting a tenant revokes the tenant's keys and keeps the tenant's usage and name.

    Erasing the tenant removes every row that names the tenant.
    """
    ledger.tenants.create(ACME)
    key = ledger.keys.create("acme").secret
    record = UsageRecord("r1", "acme", "k", "m", "v1", "q", 1.0, "ok")
    ledger.usage.insert([record])
    ledger.audit.insert([AuditEvent(1.0, "admin", "x", tenant="acme")])
    ledger.tenants.delete("acme")
    assert reason(ledger.snapshots.read(), key) == "unknown"
    assert len(ledger.usage.query(UsageQuery())) == 1
    with pytest.raises(errors.AlreadyExists, match="--erase"):
        ledger.tenants.create(ACME)
    assert ledger.erase("acme") == 4
    assert ledger.usage.query(UsageQuery()) == []
    assert ledger.audit.list() == []
    ledger.usage.insert([record])
    assert ledger.usage.query(UsageQuery()) == [], "a late report must not bring an erased tenant back"
    ledger.tenants.create(ACME)
    assert ledger.keys.list("acme") == []
    with pytest.raises(errors.NotFound):
        ledger.erase("nobody")
