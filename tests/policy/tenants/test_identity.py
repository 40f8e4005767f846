"""Tests of keys, certificates, handles and cache salts: who is authenticated, and that a refusal reveals nothing."""

from __future__ import annotations

import gc
import hashlib
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.outcomes import CallError, Outcome
from cluster.policy.tenants import identity
from cluster.policy.tenants.identity import AccessSnapshot, CertificateRule, KeyEntry, TenantEntry
from cluster.policy.tenants.policy import TenantPolicy

NOW = 1_000_000.0
PEPPER, OLD_PEPPER = b"p" * 32, b"o" * 32
SECRETS = (b"1" * 32, b"2" * 32)
MAX_GAP = 0.05
"""Between the medians of two kinds of refused keys, relative to the smaller."""


def key_of(number: int) -> str:
    """Return a deterministic key."""
    return identity.make_key(f"k{number}", hashlib.sha256(str(number).encode()).digest())


def entry(token: str, tenant: str = "acme", pepper: bytes = PEPPER, **changes: object) -> KeyEntry:
    """Return the stored entry of a key."""
    digest = identity.digest_of(identity.sha256_of(token), pepper)
    return KeyEntry(identity.key_id_of(token) or "other", tenant, digest, **changes)  # type: ignore[arg-type]


def world(*keys: KeyEntry) -> AccessSnapshot:
    """Return a snapshot with one active tenant and one suspended tenant."""
    tenants = [TenantEntry(TenantPolicy("acme")), TenantEntry(TenantPolicy("gone", suspended=True), "file")]
    return AccessSnapshot.of(tenants, keys, 7, NOW)


def reason(snapshot: AccessSnapshot, token: str) -> str:
    """Return the audit reason for this token."""
    return identity.authenticate(snapshot, token, (PEPPER, OLD_PEPPER), NOW).reason


def test_a_key_names_its_tenant() -> None:
    """A stored key authenticates as its tenant, with the id and the role of the key."""
    snapshot = world(entry(key_of(1), role="viewer"))
    principal = identity.authenticate(snapshot, key_of(1), (PEPPER,), NOW).require()
    assert (principal.tenant.name, principal.role, principal.subject, principal.by) == ("acme", "viewer", "k1", "key")


def test_every_way_of_being_refused() -> None:
    """Each cause of a refusal has its own audit reason: unknown, expired, revoked and suspended keys, another pepper,
    no tenant."""
    snapshot = world(
        entry(key_of(1), expires_at_s=NOW),
        entry(key_of(2), revoked=True),
        entry(key_of(3), tenant="gone"),
        entry(key_of(4), pepper=b"x" * 32),
        entry(key_of(5), tenant="nobody-knows"),
        entry(key_of(6), expires_at_s=NOW + 1),
    )
    found = [reason(snapshot, key_of(n)) for n in range(1, 8)]
    assert found == ["expired", "revoked", "suspended", "unknown", "unknown", "ok", "unknown"]


def test_callers_cannot_tell_unknown_from_expired_from_revoked() -> None:
    """Every invalid key gets exactly the same error, whether it is unknown, expired or revoked."""
    snapshot = world(entry(key_of(1), expires_at_s=NOW), entry(key_of(2), revoked=True), entry(key_of(3)))
    errors = []
    for token in (key_of(1), key_of(2), key_of(9), key_of(3)[:-1], "", "x" * 2_000_000):
        with pytest.raises(CallError) as caught:
            identity.authenticate(snapshot, token, (PEPPER,), NOW).require()
        errors.append((caught.value.outcome, caught.value.message, caught.value.retry_after_s))
    assert set(errors) == {(Outcome.UNAUTHENTICATED_KEY, identity.BAD_KEY, None)}


def test_a_suspended_tenant_is_told_so() -> None:
    """For a valid key of a suspended tenant, the error names the suspension."""
    with pytest.raises(CallError) as caught:
        identity.authenticate(world(entry(key_of(1), tenant="gone")), key_of(1), (PEPPER,), NOW).require()
    assert caught.value.outcome is Outcome.TENANT_SUSPENDED


def test_a_pepper_is_replaced_without_downtime() -> None:
    """A key stored under the second pepper is valid; a key stored under a removed pepper is not."""
    snapshot = world(entry(key_of(1), pepper=OLD_PEPPER))
    assert identity.authenticate(snapshot, key_of(1), (PEPPER, OLD_PEPPER), NOW).reason == "ok"
    assert identity.authenticate(snapshot, key_of(1), (PEPPER,), NOW).reason == "unknown"


def test_a_hash_of_another_system_comes_over() -> None:
    """A key that was imported only by its SHA-256 is valid, whatever its format."""
    foreign = "sk-1234abcd"
    digest = identity.digest_of(hashlib.sha256(foreign.encode()).digest(), PEPPER)
    assert reason(world(KeyEntry("i1", "acme", digest)), foreign) == "ok"


def test_keys_hold_256_bits_and_their_id() -> None:
    """A key holds all bits of its secret and the id of the key. Different secrets give different keys."""
    low, high = identity.make_key("abc", b"\0" * 32), identity.make_key("abc", b"\xff" * 32)
    assert low != high
    assert len(low) == len(high) == len("hr_abc_") + 43
    assert identity.key_id_of(high) == "abc"
    assert [identity.key_id_of(t) for t in (high[:-1], "hr_abc", "sk-1", "hr_", high + "x", "hr__" + "a" * 43)] == [
        ""
    ] * 6


@pytest.mark.parametrize("bad", [b"", b"x" * 31, b"x" * 33])
def test_a_short_secret_is_refused(bad: bytes) -> None:
    """A secret of fewer than 256 bits is refused."""
    with pytest.raises(ValueError, match="32 bytes"):
        identity.make_key("abc", bad)


@given(st.text(max_size=2000))
def test_any_text_is_refused_without_an_exception(token: str) -> None:
    """If any text is presented as a token, authentication refuses it and raises no exception."""
    assert identity.authenticate(world(), token, (PEPPER,), NOW).principal is None


def test_a_lone_surrogate_is_refused() -> None:
    """A token that is not valid UTF-8 is an unknown key."""
    assert reason(world(), "hr_\ud800") == "unknown"


def test_clock_steps_back_make_a_key_valid_no_longer_than_its_expiry_says() -> None:
    """If the clock steps back, a key is judged only by the current time: the check leaves no state behind."""
    snapshot = world(entry(key_of(1), expires_at_s=NOW))
    verdicts = [
        identity.authenticate(snapshot, key_of(1), (PEPPER,), t).reason for t in (NOW - 1, NOW + 1, NOW - 1, NOW)
    ]
    assert verdicts == ["ok", "expired", "ok", "expired"]


def _elapsed_ns(work: Callable[[], object]) -> int:
    start = time.perf_counter_ns()
    work()
    return time.perf_counter_ns() - start


def _gap(samples: dict[str, list[int]]) -> float:
    """Return the largest difference between the trimmed medians of two kinds of keys, relative to the smallest trimmed
    median."""
    medians = [statistics.median(sorted(times)[: len(times) * 3 // 4]) for times in samples.values()]
    return (max(medians) - min(medians)) / min(medians)


def refusal_gaps() -> list[float]:
    """Measure how the times of refusals differ between unknown, expired, revoked and suspended keys. Each round makes
    10,000 interleaved tries and gives one gap. Up to five rounds are made, until a gap is below MAX_GAP. Return all
    gaps."""
    keys = [entry(key_of(n)) for n in range(1000)]
    keys += [entry(key_of(5000), expires_at_s=NOW), entry(key_of(5001), revoked=True)]
    snapshot = world(*keys, entry(key_of(5002), tenant="gone"))
    tokens = {"expired": key_of(5000), "revoked": key_of(5001), "suspended": key_of(5002), "unknown": key_of(5003)}
    assert {kind: reason(snapshot, token) for kind, token in tokens.items()} == {kind: kind for kind in tokens}
    order = random.Random(1)
    gaps: list[float] = []
    while len(gaps) < 5 and min(gaps, default=1.0) >= MAX_GAP:
        samples: dict[str, list[int]] = {kind: [] for kind in tokens}
        plan = [kind for kind in tokens for _ in range(2500)]
        order.shuffle(plan)
        gc.disable()
        try:
            for kind in plan:
                token = tokens[kind]
                samples[kind].append(_elapsed_ns(lambda t=token: identity.authenticate(snapshot, t, (PEPPER,), NOW)))  # type: ignore[misc]
        finally:
            gc.enable()
        gaps.append(_gap(samples))
    return gaps


def test_refusals_take_the_same_time() -> None:
    """The time of a refusal does not reveal whether a key is unknown, expired, revoked or suspended.

    The test compares the medians of the lower three quarters of the times, which scheduling does not affect. One of
    five rounds must pass, since a busy machine can only widen the gap and never hides a different code path. The times
    are taken in a separate process: in a process that has run a thousand tests, each further object that is looked up
    for one kind of key is a miss of the processor's cache.
    """
    program = "from tests.policy.tenants.test_identity import refusal_gaps; print(*refusal_gaps())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    gaps = [float(gap) for gap in done.stdout.split()]
    assert min(gaps) < MAX_GAP, f"gaps between medians {[f'{gap:.1%}' for gap in gaps]}"


def test_the_timing_test_would_see_an_early_return() -> None:
    """The timing test detects code that does not hash unknown keys: the measured gap is then large."""
    samples: dict[str, list[int]] = {"hashed": [], "skipped": []}
    snapshot = world()
    for _ in range(2500):
        samples["hashed"].append(_elapsed_ns(lambda: identity.authenticate(snapshot, key_of(1), (PEPPER,), NOW)))
        samples["skipped"].append(_elapsed_ns(lambda: snapshot.keys.get(b"")))
    assert _gap(samples) > 0.2


def test_a_megabyte_token_costs_no_more_than_a_key() -> None:
    """The length of a token is checked first, so a token of 64 MB is refused faster than an ordinary key is looked
    up."""
    snapshot, huge = world(), "x" * 64_000_000
    long = min(_elapsed_ns(lambda: identity.authenticate(snapshot, huge, (PEPPER,), NOW)) for _ in range(50))
    short = min(_elapsed_ns(lambda: identity.authenticate(snapshot, key_of(1), (PEPPER,), NOW)) for _ in range(50))
    assert long < short
    assert identity.authenticate(snapshot, huge, (PEPPER,), NOW).reason == "too_long"


def test_a_snapshot_survives_json() -> None:
    """A snapshot is equal after a round trip through JSON, including a key without expiry."""
    snapshot = world(entry(key_of(1), name="ci", role="operator"), entry(key_of(2), expires_at_s=5.5, revoked=True))
    assert AccessSnapshot.from_json(json.loads(json.dumps(snapshot.as_json()))) == snapshot


def test_declared_tenants_stand_over_stored_ones() -> None:
    """If a tenant in a file and a stored tenant have the same name, the tenant in the file applies, but keeps the
    stored tenant's aliases. Tenants with other names are unchanged."""
    stored = AccessSnapshot.of([TenantEntry(TenantPolicy("acme"), "api", {"gpt": "tiny"})], [])
    declared = stored.with_declared([TenantPolicy("acme", weight=4.0), TenantPolicy("new")])
    assert declared.tenants["acme"] == TenantEntry(TenantPolicy("acme", weight=4.0), "file", {"gpt": "tiny"})
    assert set(declared.tenants) == {"acme", "new"}
    assert stored.tenants["acme"].policy.weight == 1.0


def test_claims_name_tenants_that_exist() -> None:
    """A signed token that claims an unknown or suspended tenant is refused. A token with an unknown role gets the role
    `caller`."""
    assert identity.identify(world(), "nope", "jwt", "s").outcome is Outcome.UNAUTHENTICATED_KEY
    assert identity.identify(world(), "gone", "jwt", "s").outcome is Outcome.TENANT_SUSPENDED
    assert identity.identify(world(), "acme", "jwt", "s", "root").require().role == "caller"
    assert identity.identify(world(), "acme", "jwt", "s", "operator").require().role == "operator"


def test_certificates_map_by_their_alternative_names() -> None:
    """A certificate's alternative names determine its tenant. URIs match exactly, DNS names match without regard to
    case, and wildcards never match. A certificate whose names belong to two tenants maps to no tenant."""
    rules = [
        CertificateRule("spiffe://example.com/ns/billing", "billing"),
        CertificateRule("api.acme.example", "acme"),
    ]

    def find(names: list[str], rules: list[CertificateRule]) -> str | None:
        owner = identity.owner_of_certificate(names, rules)
        return owner.tenant if owner else None

    assert find(["URI:spiffe://example.com/ns/billing", "DNS:x"], rules) == "billing"
    assert find(["DNS:API.acme.example."], rules) == "acme"
    assert find(["URI:spiffe://example.com/ns/Billing"], rules) is None
    assert find(["URI:spiffe://example.com/ns/billing/more"], rules) is None
    assert find(["DNS:*.acme.example"], rules) is None
    assert find(["URI:spiffe://example.com/ns/billing", "DNS:api.acme.example"], rules) is None
    assert find([], rules) is None
    ops = CertificateRule("ops.example", "acme", "operator")
    owner = identity.owner_of_certificate(["DNS:x", "DNS:Ops.example"], [*rules, ops])
    assert owner == identity.CertificateOwner("acme", "operator", "DNS:ops.example"), (
        "the name that fits, not the first"
    )
    assert identity.owner_of_certificate(["DNS:ops.example", "DNS:api.acme.example"], [*rules, ops]) is None


KINDS = st.sampled_from(["URI:", "DNS:", "email:", "IP Address:", "dns:", "uri:", ""])


@given(KINDS, st.sampled_from(["", "DNS:", "URI:", "dns:"]), st.sampled_from(["api.acme.example", "spiffe://x/alpha"]))
def test_a_name_of_another_kind_is_nobodys(kind: str, more: str, name: str) -> None:
    """A URI never matches a DNS rule, and a DNS name never matches a URI rule.

    Otherwise a certificate holder that can choose URIs could become the tenant of a DNS name.
    """
    rules = [CertificateRule("api.acme.example", "acme"), CertificateRule("spiffe://x/alpha", "alpha")]
    owner = identity.owner_of_certificate([kind + more + name], rules)
    own = "URI:" if "://" in name else "DNS:"
    assert (owner is not None) == (kind + more == own)


def test_what_each_role_may_do() -> None:
    """Operators may manage the cluster, viewers may read its state, and tenant administrators may manage the keys of
    their tenant. Callers may do none of these."""

    def allowed(role: str) -> set[tuple[str, str]]:
        principal = identity.identify(world(), "acme", "jwt", "s", role).require()
        pairs = [(what, tenant) for what in ("read", "keys", "tenants", "fleet") for tenant in ("acme", "gone", "")]
        return {pair for pair in pairs if identity.is_allowed(principal, *pair)}

    assert allowed("caller") == set()
    assert allowed("viewer") == {("read", "acme"), ("read", "gone"), ("read", "")}
    assert allowed("tenant_admin") == {("read", "acme"), ("keys", "acme")}
    assert len(allowed("operator")) == 12


def test_salts_part_tenants_and_join_groups() -> None:
    """Each tenant without a cache group has its own cache salt, and all tenants of a cache group have the same salt.

    The salt of a tenant differs from the salt of a group with the same name, and from any salt that contains a part
    from a client.
    """
    a, b = TenantPolicy("a"), TenantPolicy("b")
    grouped = [TenantPolicy(n, cache_group="g") for n in ("c", "d")]
    salts = [identity.cache_salt(SECRETS, p) for p in (a, b, *grouped, TenantPolicy("e", cache_group="a"))]
    assert salts[2] == salts[3]
    assert len(set(salts)) == 4
    own = identity.cache_salt(SECRETS, a, client_salt="x")
    assert own not in {*salts, identity.cache_salt(SECRETS, b, client_salt="x")}
    assert identity.cache_salt((b"9" * 32,), a) != salts[0]


@given(st.text(), st.text(), st.text(), st.text())
def test_no_client_salt_reaches_another_tenants_cache(a: str, b: str, c: str, d: str) -> None:
    """Two tenants have different cache salts, whatever salts their clients send. `derive` returns different values for
    different pairs of texts."""
    one, two = TenantPolicy("acme"), TenantPolicy("acme2")
    assert identity.cache_salt(SECRETS, one, a) != identity.cache_salt(SECRETS, two, b)
    if (a, b) != (c, d):
        assert identity.derive(b"k", "p", a, b) != identity.derive(b"k", "p", c, d)


def test_handles_say_nothing_and_tell_tenants_apart() -> None:
    """A tenant's handle does not contain the tenant's name. Under one secret the handle is the same everywhere; under
    another secret it is different."""
    one, two = (identity.tenant_handle(SECRETS, name) for name in ("acme", "acme2"))
    assert one != two
    assert "acme" not in one
    assert one == identity.tenant_handle(SECRETS[:1], "acme") != identity.tenant_handle(SECRETS[1:], "acme")


def test_the_first_secret_signs_and_all_verify() -> None:
    """A tag (an authentication code) is accepted if it was derived from any secret in the list.

    A tag is refused if its secret is not in the list, or if it was derived for another text or another purpose.
    """
    tag = identity.derive(SECRETS[1], "resume", "call-1")
    assert identity.verify_any(SECRETS, "resume", tag, "call-1")
    assert not identity.verify_any(SECRETS[:1], "resume", tag, "call-1")
    assert not identity.verify_any(SECRETS, "resume", tag, "call-2")
    assert not identity.verify_any(SECRETS, "other", tag, "call-1")


def test_a_snapshot_of_a_later_release_is_read() -> None:
    """A snapshot that a later release has saved, with a further field in its policies, is read after a rollback."""
    snapshot = AccessSnapshot.of([TenantEntry(TenantPolicy("acme"))], [], 7, 1000.0)
    value = snapshot.as_json()
    value["tenants"][0]["policy"]["later"] = None
    assert AccessSnapshot.from_json(value) == snapshot
