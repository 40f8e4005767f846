"""Who asks: keys, claims and certificates become a tenant; a tenant becomes a handle and a cache salt.

Problem: tenants do not trust each other, and whoever guesses must learn nothing, not even by a clock. So every key
is looked up alike: HMAC-SHA256(pepper, SHA-256(whole key)) for each pepper, one look into a table, and one decision
over flags. A key that is not there is replaced by an entry that can never pass, so that unknown, expired, revoked
and suspended run the same statements; only the word for the audit differs, and the caller sees it for a suspended
tenant alone (who has shown a good key). The pepper keeps an attacker from steering where the look goes, and the inner
SHA-256 lets the hashes of systems that keep just that come over without anybody changing a key.

No clock and no chance: `now_s` (seconds since the epoch) and random bytes are arguments.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from cluster.api.outcomes import CallError, Outcome
from cluster.policy.tenants.policy import TenantPolicy

KEY_PREFIX = "hr_"
SECRET_BYTES = 32
MAX_KEY_BYTES = 512
"""Longer tokens are no keys; they are refused before anything reads them."""
ROLES = ("caller", "viewer", "tenant_admin", "operator")
BAD_KEY = "the API key is unknown, expired or revoked: send `authorization: Bearer <key>` with a valid one"
SUSPENDED = "this tenant is suspended: ask the cluster's operators"
_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SECRET_LENGTH = 43  # base62 digits that hold 256 bits


def _base62(value: bytes, length: int) -> str:
    number = int.from_bytes(value, "big")
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_BASE62[digit])
    return "".join(reversed(digits))


def make_key(key_id: str, secret: bytes) -> str:
    """The key as its owner sees it, once: `hr_<id>_<secret>`. `secret` is 32 random bytes."""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a key's secret has {SECRET_BYTES} bytes, not {len(secret)}")
    if not key_id.isascii() or not key_id.isalnum() or not 1 <= len(key_id) <= 32:
        raise ValueError("a key's id is 1 to 32 ASCII letters and digits")
    return f"{KEY_PREFIX}{key_id}_{_base62(secret, _SECRET_LENGTH)}"


def key_id_of(token: str) -> str:
    """The id that a token claims, for people and logs; empty when it is none of ours or cut short. Proves nothing."""
    if len(token) > MAX_KEY_BYTES or not token.startswith(KEY_PREFIX):
        return ""
    key_id, _, secret = token[len(KEY_PREFIX) :].partition("_")
    good = len(secret) == _SECRET_LENGTH and key_id.isascii() and key_id.isalnum() and len(key_id) <= 32
    return key_id if good else ""


def sha256_of(token: str) -> bytes:
    """What other systems keep of a key, and what our own digest is made from. Lone surrogates do not raise."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def digest_of(sha256: bytes, pepper: bytes) -> bytes:
    """What is stored of a key, 32 bytes; `sha256` is `sha256_of` the whole key."""
    return hmac.digest(pepper, sha256, "sha256")


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """A key as gateways know it. `expires_at_s` is infinite for none; `role` one of ROLES."""

    id: str
    tenant: str
    digest: bytes
    name: str = ""
    role: str = "caller"
    expires_at_s: float = math.inf
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class TenantEntry:
    """A tenant as gateways know it. `origin` is file or api; `model_aliases` are names that only this tenant has."""

    policy: TenantPolicy
    origin: str = "api"
    model_aliases: Mapping[str, str] = field(default_factory=dict)


_NO_KEY = KeyEntry("", "", b"", expires_at_s=-math.inf, revoked=True)
_NO_TENANT = TenantEntry(TenantPolicy("nobody", suspended=True))


@dataclass(frozen=True, slots=True)
class AccessSnapshot:
    """Everybody known at one point of the database's history. Built whole, never changed.

    `sequence` is the database's change number; `taken_at_s` when it was last confirmed to be the newest.
    """

    sequence: int = 0
    taken_at_s: float = 0.0
    tenants: Mapping[str, TenantEntry] = field(default_factory=dict)
    keys: Mapping[bytes, KeyEntry] = field(default_factory=dict)

    @classmethod
    def of(
        cls, tenants: Iterable[TenantEntry], keys: Iterable[KeyEntry], sequence: int = 0, taken_at_s: float = 0.0
    ) -> Self:
        """From entries in any order."""
        by_name = {entry.policy.name: entry for entry in tenants}
        return cls(sequence, taken_at_s, by_name, {key.digest: key for key in keys})

    def declaring(self, policies: Iterable[TenantPolicy]) -> AccessSnapshot:
        """This one with the tenants that a file declares in place of those of the same name."""
        tenants = dict(self.tenants)
        for policy in policies:
            known = tenants.get(policy.name)
            tenants[policy.name] = TenantEntry(policy, "file", known.model_aliases if known else {})
        return AccessSnapshot(self.sequence, self.taken_at_s, tenants, self.keys)

    def as_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is the inverse."""
        return {
            "sequence": self.sequence,
            "taken_at_s": self.taken_at_s,
            "tenants": [
                {"policy": one.policy.as_json(), "origin": one.origin, "model_aliases": dict(one.model_aliases)}
                for one in self.tenants.values()
            ],
            "keys": [
                {
                    "id": one.id,
                    "tenant": one.tenant,
                    "digest": one.digest.hex(),
                    "name": one.name,
                    "role": one.role,
                    "expires_at_s": None if math.isinf(one.expires_at_s) else one.expires_at_s,
                    "revoked": one.revoked,
                }
                for one in self.keys.values()
            ],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """From plain values. Raises ValueError, KeyError or TypeError for what `as_json` does not write."""
        tenants = [
            TenantEntry(TenantPolicy.from_json(one["policy"]), one["origin"], dict(one["model_aliases"]))
            for one in value["tenants"]
        ]
        keys = [
            KeyEntry(
                one["id"],
                one["tenant"],
                bytes.fromhex(one["digest"]),
                one["name"],
                one["role"],
                math.inf if one["expires_at_s"] is None else float(one["expires_at_s"]),
                bool(one["revoked"]),
            )
            for one in value["keys"]
        ]
        return cls.of(tenants, keys, int(value["sequence"]), float(value["taken_at_s"]))


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a call is: the tenant, in which role, and by what (`key`, `jwt` or `certificate`; `subject` names it)."""

    tenant: TenantPolicy
    role: str = "caller"
    by: str = "key"
    subject: str = ""
    model_aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AuthVerdict:
    """What became of a try. Exactly one of `principal` and `outcome` is set.

    `reason` is for audit and metrics only: ok, too_long, unknown, expired, revoked or suspended.
    """

    principal: Principal | None
    outcome: Outcome | None
    reason: str
    key_id: str = ""

    def require(self) -> Principal:
        """The principal. Raises CallError with what the caller may know."""
        if self.principal is None:
            outcome = self.outcome or Outcome.UNAUTHENTICATED_KEY
            raise CallError(outcome, SUSPENDED if outcome is Outcome.TENANT_SUSPENDED else BAD_KEY)
        return self.principal


# (known, in time and not revoked, tenant active) as three bits -> reason
_REASONS = ("unknown", "unknown", "unknown", "unknown", "expired", "expired", "suspended", "ok")


def authenticate(snapshot: AccessSnapshot, token: str, peppers: Sequence[bytes], now_s: float) -> AuthVerdict:
    """Look a key up. The first pepper is the one new keys are stored with; all verify, all are always tried."""
    if len(token) > MAX_KEY_BYTES:
        return AuthVerdict(None, Outcome.UNAUTHENTICATED_KEY, "too_long")
    inner = sha256_of(token)
    entry = _NO_KEY
    for pepper in peppers:
        entry = snapshot.keys.get(digest_of(inner, pepper), entry)
    tenant = snapshot.tenants.get(entry.tenant, _NO_TENANT)
    known = entry is not _NO_KEY and tenant is not _NO_TENANT
    valid = (now_s < entry.expires_at_s) & (not entry.revoked)
    active = not tenant.policy.suspended
    reason = _REASONS[known << 2 | valid << 1 | active]
    principal = Principal(tenant.policy, entry.role, "key", entry.id, tenant.model_aliases)
    outcome = Outcome.TENANT_SUSPENDED if reason == "suspended" else Outcome.UNAUTHENTICATED_KEY
    detail = "revoked" if reason == "expired" and entry.revoked else reason
    passed = reason == "ok"
    return AuthVerdict(principal if passed else None, None if passed else outcome, detail, key_id_of(token) or entry.id)


def identify(snapshot: AccessSnapshot, tenant: str, by: str, subject: str, role: str = "caller") -> AuthVerdict:
    """The verdict for who has shown a signed claim or a certificate that names `tenant`."""
    entry = snapshot.tenants.get(tenant, _NO_TENANT)
    if entry is _NO_TENANT:
        return AuthVerdict(None, Outcome.UNAUTHENTICATED_KEY, "unknown", subject)
    if entry.policy.suspended:
        return AuthVerdict(None, Outcome.TENANT_SUSPENDED, "suspended", subject)
    held = role if role in ROLES else "caller"
    return AuthVerdict(Principal(entry.policy, held, by, subject, entry.model_aliases), None, "ok", subject)


@dataclass(frozen=True, slots=True)
class CertificateRule:
    """A client certificate's alternative name (`spiffe://...` or a DNS name, its kind before it or not), whose it is,
    in which role."""

    san: str
    tenant: str
    role: str = "caller"


@dataclass(frozen=True, slots=True)
class CertificateOwner:
    """Who a certificate is: the tenant, its role, and the alternative name that says so, with its kind."""

    tenant: str
    role: str
    name: str


def owner_of_certificate(names: Iterable[str], rules: Sequence[CertificateRule]) -> CertificateOwner | None:
    """The owner of a verified certificate with these alternative names, each with its kind: `URI:...`, `DNS:...`.

    None when no rule fits, or when rules of two tenants or roles do. A name fits a rule of its own kind only: an
    authority that checks DNS names may let its holders choose URIs. URIs are compared to the letter, DNS names without
    case; no wildcards, since a wildcard certificate would then be every tenant below it.
    """
    owners = {_canonical(_with_kind(rule.san)): (rule.tenant, rule.role) for rule in rules}
    found = [name for name in map(_canonical, names) if name in owners]
    if len({owners[name] for name in found}) != 1:
        return None
    return CertificateOwner(*owners[found[0]], found[0])


def _with_kind(san: str) -> str:
    if san.startswith(("URI:", "DNS:")):
        return san
    return f"URI:{san}" if "://" in san else f"DNS:{san}"


def _canonical(name: str) -> str:
    kind, _, value = name.partition(":")
    return f"DNS:{value.lower().rstrip('.')}" if kind == "DNS" else name


MAX_SUBJECT_CHARACTERS = 512


def is_subject(text: str) -> bool:
    """Whether logs, audit and terminals can take a subject that an issuer names: printable and not too long."""
    return len(text) <= MAX_SUBJECT_CHARACTERS and text.isprintable()


# What a role may do, and whether to its own tenant only.
_GRANTS: Mapping[str, tuple[frozenset[str], bool]] = {
    "caller": (frozenset(), True),
    "viewer": (frozenset({"read"}), False),
    "tenant_admin": (frozenset({"read", "keys"}), True),
    "operator": (frozenset({"read", "keys", "tenants", "fleet"}), False),
}


def may(principal: Principal, what: str, tenant: str = "") -> bool:
    """Whether a role may do `what` (read, keys, tenants, fleet) to a tenant; "" means the cluster as a whole."""
    granted, own_only = _GRANTS[principal.role]
    return what in granted and (not own_only or tenant == principal.tenant.name)


def may_grant(principal: Principal, role: str) -> bool:
    """Whether a role may make, replace or end keys of another; else a tenant's administrator would make an operator."""
    return principal.role == "operator" or (principal.role == "tenant_admin" and role in ("caller", "tenant_admin"))


def admin_token(secret: bytes) -> str:
    """What whoever holds the cluster's secret shows on the admin port: for a local cluster's own commands."""
    return f"{KEY_PREFIX}admin_{derive(secret, 'admin-token').hex()}"


def derive(secret: bytes, purpose: str, *parts: str | bytes) -> bytes:
    """32 bytes for one purpose. Parts are length-prefixed, so that no two lists of them ever read the same."""
    message = bytearray()
    for part in (f"headrace/{purpose}", *parts):
        raw = part.encode() if isinstance(part, str) else part
        message += len(raw).to_bytes(8, "big") + raw
    return hmac.digest(secret, bytes(message), "sha256")


def key_number(secret: bytes) -> str:
    """Which secret of a list something was made with: 8 hex digits that tell nothing of it."""
    return derive(secret, "key-number")[:4].hex()


def tenant_handle(secrets: Sequence[bytes], tenant: str) -> str:
    """What workers see of a tenant: 32 hex digits, the same at every gateway that has the cluster's first secret."""
    return derive(secrets[0], "tenant-handle", tenant)[:16].hex()


def cache_salt(secrets: Sequence[bytes], policy: TenantPolicy, client_salt: str = "") -> str:
    """The prefix-cache salt of a tenant's calls, 64 hex digits; never sent to clients.

    Tenants share a prefix only in a cache_group that an operator has given to both. A group and a tenant of one name
    stay apart. A client's own salt is mixed in: it divides its tenant's cache further and reaches nobody else's.
    """
    owner = ("group", policy.cache_group) if policy.cache_group else ("tenant", policy.name)
    return derive(secrets[0], "cache-salt", *owner, key_number(secrets[0]), client_salt).hex()


def salted_identifier(salt: str, identifier: str) -> str:
    """An image's identifier under a tenant's salt, for caches that know no salt of their own."""
    return derive(salt.encode(), "identifier", identifier)[:16].hex()


def verify_any(secrets: Sequence[bytes], purpose: str, tag: bytes, *parts: str | bytes) -> bool:
    """Whether `tag` was derived under any secret of the list. All are tried."""
    good = False
    for secret in secrets:
        good |= hmac.compare_digest(derive(secret, purpose, *parts), tag)
    return good
