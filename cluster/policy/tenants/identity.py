"""Authentication: API keys, JWTs and certificates are mapped to a tenant. A tenant is mapped to a handle (its pseudonym
for workers) and a cache salt.

Problem: tenants do not trust each other, and guessing a key must reveal nothing, not even by timing.

Method: every key is looked up in the same way: HMAC-SHA256(pepper, SHA-256(whole key)) for each pepper, one table
lookup, and one decision that combines the results of all checks. An unknown key is replaced by an entry that can never
pass, so that unknown, expired, revoked and suspended keys run the same statements. Only the reason in the audit log
differs. The caller gets the reason only for a suspended tenant, because the caller has then presented a valid key.

The pepper makes the table position of a key unpredictable. The inner SHA-256 allows the import of keys from systems
that store only a key's SHA-256.

This module uses no clock and no randomness: `now_s` (seconds since the epoch) and random bytes are arguments.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

from cluster.api.frozen import frozen_dataclass
from cluster.api.outcomes import CallError, Outcome
from cluster.policy.tenants.policy import TenantPolicy

KEY_PREFIX = "hr_"
SECRET_BYTES = 32
MAX_KEY_BYTES = 512
"""Maximum length of a token. A longer token is rejected before the token is hashed or looked up."""
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
    """Format a key as `hr_<id>_<secret>`. The owner sees the key in this form only once.

    `secret` is 32 random bytes. Raises ValueError for a secret of another length or an invalid key id.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a key's secret has {SECRET_BYTES} bytes, not {len(secret)}")
    if not key_id.isascii() or not key_id.isalnum() or not 1 <= len(key_id) <= 32:
        raise ValueError("a key's id is 1 to 32 ASCII letters and digits")
    return f"{KEY_PREFIX}{key_id}_{_base62(secret, _SECRET_LENGTH)}"


def key_id_of(token: str) -> str:
    """Return the key id in a token, for humans and logs. The key is not verified.

    Returns "" if the token has another format or is cut short.
    """
    if len(token) > MAX_KEY_BYTES or not token.startswith(KEY_PREFIX):
        return ""
    key_id, _, secret = token[len(KEY_PREFIX) :].partition("_")
    good = len(secret) == _SECRET_LENGTH and key_id.isascii() and key_id.isalnum() and len(key_id) <= 32
    return key_id if good else ""


def sha256_of(token: str) -> bytes:
    """Return the SHA-256 of a key, the input of `digest_of`. Keys with lone surrogates are accepted.

    Keys from systems that store only the SHA-256 can be imported in this form.
    """
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def digest_of(sha256: bytes, pepper: bytes) -> bytes:
    """Return the digest under which a key is stored, 32 bytes. `sha256`: the result of `sha256_of` for the key."""
    return hmac.digest(pepper, sha256, "sha256")


@dataclass(frozen=True, slots=True)
class KeyEntry:
    """An API key in the form that gateways use.

    `expires_at_s` is infinite for a key that never expires. `role` is one of ROLES.
    """

    id: str
    tenant: str
    digest: bytes
    name: str = ""
    role: str = "caller"
    expires_at_s: float = math.inf
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class TenantEntry:
    """Tenant in the form that gateways use.

    `origin`: `file` for a tenant that the configuration file declares, else `api`. `model_aliases` are aliases of this
    tenant alone.
    """

    policy: TenantPolicy
    origin: str = "api"
    model_aliases: Mapping[str, str] = field(default_factory=dict)


_NO_KEY = KeyEntry("", "", b"", expires_at_s=-math.inf, revoked=True)
_NO_TENANT = TenantEntry(TenantPolicy("nobody", suspended=True))


@dataclass(frozen=True, slots=True)
class AccessSnapshot:
    """All tenants and keys at one point in the history of the database. A snapshot is never changed.

    `sequence`: number of the last database change in the snapshot. `taken_at_s`: latest time at which the snapshot was
    known to be up to date, in seconds since the epoch. `database_id`: the database whose changes `sequence` numbers; ""
    if it is unknown.
    """

    sequence: int = 0
    taken_at_s: float = 0.0
    tenants: Mapping[str, TenantEntry] = field(default_factory=dict)
    keys: Mapping[bytes, KeyEntry] = field(default_factory=dict)
    database_id: str = ""

    @classmethod
    def of(
        cls,
        tenants: Iterable[TenantEntry],
        keys: Iterable[KeyEntry],
        sequence: int = 0,
        taken_at_s: float = 0.0,
        database_id: str = "",
    ) -> Self:
        """Build a snapshot from entries in any order."""
        by_name = {entry.policy.name: entry for entry in tenants}
        return cls(sequence, taken_at_s, by_name, {key.digest: key for key in keys}, database_id)

    def with_declared(self, policies: Iterable[TenantPolicy]) -> AccessSnapshot:
        """Return a copy with the tenants that the configuration file declares. They replace stored tenants of the same
        name."""
        tenants = dict(self.tenants)
        for policy in policies:
            known = tenants.get(policy.name)
            tenants[policy.name] = TenantEntry(policy, "file", known.model_aliases if known else {})
        return replace(self, tenants=tenants)

    def as_json(self) -> dict[str, Any]:
        """Return the snapshot as plain JSON values; `from_json` is the inverse."""
        return {
            "sequence": self.sequence,
            "taken_at_s": self.taken_at_s,
            "database_id": self.database_id,
            "tenants": [
                {"policy": entry.policy.as_json(), "origin": entry.origin, "model_aliases": dict(entry.model_aliases)}
                for entry in self.tenants.values()
            ],
            "keys": [
                {
                    "id": key.id,
                    "tenant": key.tenant,
                    "digest": key.digest.hex(),
                    "name": key.name,
                    "role": key.role,
                    "expires_at_s": None if math.isinf(key.expires_at_s) else key.expires_at_s,
                    "revoked": key.revoked,
                }
                for key in self.keys.values()
            ],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the snapshot from JSON values; the inverse of `as_json`.

        Unknown fields of policies are ignored, because a later release may have saved the snapshot before a rollback.
        Raises ValueError, KeyError or TypeError for invalid values.
        """
        tenants = [
            TenantEntry(TenantPolicy.from_stored(entry["policy"]), entry["origin"], dict(entry["model_aliases"]))
            for entry in value["tenants"]
        ]
        keys = [
            KeyEntry(
                key["id"],
                key["tenant"],
                bytes.fromhex(key["digest"]),
                key["name"],
                key["role"],
                math.inf if key["expires_at_s"] is None else float(key["expires_at_s"]),
                bool(key["revoked"]),
            )
            for key in value["keys"]
        ]
        database_id = str(value.get("database_id", ""))  # releases before this field saved none
        return cls.of(tenants, keys, int(value["sequence"]), float(value["taken_at_s"]), database_id)


@frozen_dataclass
class Principal:
    """Authenticated caller: its tenant and its role.

    `by` is the kind of credential (`key`, `jwt` or `certificate`); `subject` names the credential.
    """

    tenant: TenantPolicy
    role: str = "caller"
    by: str = "key"
    subject: str = ""
    model_aliases: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AuthVerdict:
    """Result of an authentication attempt. Exactly one of `principal` and `outcome` is set.

    `reason` is for audit and metrics only: `ok`, `too_long`, `unknown`, `expired`, `revoked` or `suspended`.
    """

    principal: Principal | None
    outcome: Outcome | None
    reason: str
    key_id: str = ""
    expires_at_s: float = math.inf
    """Time until which a key with this verdict is valid, in seconds since the epoch."""

    def require(self) -> Principal:
        """Return the principal. Raises CallError with an error text that reveals only what the caller may know."""
        if self.principal is None:
            outcome = self.outcome or Outcome.UNAUTHENTICATED_KEY
            raise CallError(outcome, SUSPENDED if outcome is Outcome.TENANT_SUSPENDED else BAD_KEY)
        return self.principal


# Reasons by three bits: the key is known; the key is not expired and not revoked; the tenant is active.
_REASONS = ("unknown", "unknown", "unknown", "unknown", "expired", "expired", "suspended", "ok")


def authenticate(snapshot: AccessSnapshot, token: str, peppers: Sequence[bytes], now_s: float) -> AuthVerdict:
    """Authenticate the API key `token`.

    A stored key is found if its digest was made with any of `peppers`. All peppers are always tried, to take constant
    time.
    """
    if len(token) > MAX_KEY_BYTES:
        return AuthVerdict(None, Outcome.UNAUTHENTICATED_KEY, "too_long")
    inner = sha256_of(token)
    entry = _NO_KEY
    for pepper in peppers:
        entry = snapshot.keys.get(digest_of(inner, pepper), entry)
    verdict = _key_verdict(snapshot, entry, now_s)
    return replace(verdict, key_id=key_id_of(token) or entry.id)


def key_of(snapshot: AccessSnapshot, token: str, peppers: Sequence[bytes]) -> KeyEntry | None:
    """Return the entry of the API key `token`, even if the key is expired or revoked; None for an unknown key."""
    if len(token) > MAX_KEY_BYTES:
        return None
    inner = sha256_of(token)
    entries = [snapshot.keys.get(digest_of(inner, pepper)) for pepper in peppers]
    return next((entry for entry in reversed(entries) if entry is not None), None)


def authenticate_again(snapshot: AccessSnapshot, digest: bytes, now_s: float) -> AuthVerdict:
    """Return the verdict that holds now for a key that was presented earlier. `digest`: stored digest of the key."""
    return _key_verdict(snapshot, snapshot.keys.get(digest, _NO_KEY), now_s)


def _key_verdict(snapshot: AccessSnapshot, entry: KeyEntry, now_s: float) -> AuthVerdict:
    tenant = snapshot.tenants.get(entry.tenant, _NO_TENANT)
    known = entry is not _NO_KEY and tenant is not _NO_TENANT
    valid = (now_s < entry.expires_at_s) & (not entry.revoked)
    active = not tenant.policy.suspended
    reason = _REASONS[known << 2 | valid << 1 | active]
    principal = Principal(tenant.policy, entry.role, "key", entry.id, tenant.model_aliases)
    outcome = Outcome.TENANT_SUSPENDED if reason == "suspended" else Outcome.UNAUTHENTICATED_KEY
    detail = "revoked" if reason == "expired" and entry.revoked else reason
    passed = reason == "ok"
    return AuthVerdict(principal if passed else None, None if passed else outcome, detail, entry.id, entry.expires_at_s)


def identify(snapshot: AccessSnapshot, tenant: str, by: str, subject: str, role: str = "caller") -> AuthVerdict:
    """Return the verdict for a verified JWT or certificate that names `tenant`. `by`: the kind of credentials. An
    unknown `role` is treated as "caller"."""
    entry = snapshot.tenants.get(tenant, _NO_TENANT)
    if entry is _NO_TENANT:
        return AuthVerdict(None, Outcome.UNAUTHENTICATED_KEY, "unknown", subject)
    if entry.policy.suspended:
        return AuthVerdict(None, Outcome.TENANT_SUSPENDED, "suspended", subject)
    held = role if role in ROLES else "caller"
    return AuthVerdict(Principal(entry.policy, held, by, subject, entry.model_aliases), None, "ok", subject)


@dataclass(frozen=True, slots=True)
class CertificateRule:
    """Rule that maps every client certificate that contains the subject alternative name `san` to a tenant and a role.

    `san` is a SPIFFE URI or a DNS name; a type prefix (`URI:`, `DNS:`) is optional.
    """

    san: str
    tenant: str
    role: str = "caller"


@dataclass(frozen=True, slots=True)
class CertificateOwner:
    """Owner of a certificate: its tenant and its role.

    `name` is the subject alternative name that determined the owner, with the kind of name as a prefix.
    """

    tenant: str
    role: str
    name: str


def owner_of_certificate(names: Iterable[str], rules: Sequence[CertificateRule]) -> CertificateOwner | None:
    """Return the owner of a verified certificate. `names`: subject alternative names of the certificate, each with its
    kind as a prefix (`URI:...` or `DNS:...`).

    The result is None if no rule matches, or if the matching rules name different owners. A name matches only rules of
    its own kind, because an authority that checks DNS names may let certificate holders choose their URIs. URIs are
    compared exactly, DNS names without case. Wildcards are not supported: a wildcard certificate would belong to every
    tenant whose name the wildcard covers.
    """
    owners = {_canonical(_with_kind(rule.san)): (rule.tenant, rule.role) for rule in rules}
    matches = [name for name in map(_canonical, names) if name in owners]
    if len({owners[name] for name in matches}) != 1:
        return None
    return CertificateOwner(*owners[matches[0]], matches[0])


def _with_kind(san: str) -> str:
    if san.startswith(("URI:", "DNS:")):
        return san
    return f"URI:{san}" if "://" in san else f"DNS:{san}"


def _canonical(name: str) -> str:
    kind, _, value = name.partition(":")
    return f"DNS:{value.lower().rstrip('.')}" if kind == "DNS" else name


MAX_SUBJECT_CHARACTERS = 512


def is_subject(text: str) -> bool:
    """Whether a subject that an issuer has set is safe for logs, audit and terminals: printable, with at most
    MAX_SUBJECT_CHARACTERS characters."""
    return len(text) <= MAX_SUBJECT_CHARACTERS and text.isprintable()


# Permissions of each role, and whether the permissions apply only to the tenant of the principal.
_GRANTS: Mapping[str, tuple[frozenset[str], bool]] = {
    "caller": (frozenset(), True),
    "viewer": (frozenset({"read"}), False),
    "tenant_admin": (frozenset({"read", "keys"}), True),
    "operator": (frozenset({"read", "keys", "tenants", "fleet"}), False),
}


def is_allowed(principal: Principal, what: str, tenant: str = "") -> bool:
    """Whether the principal may do `what`, which is "read", "keys", "tenants" or "fleet". `tenant`: the tenant that the
    action concerns; "" if it concerns the whole cluster."""
    granted, own_only = _GRANTS[principal.role]
    return what in granted and (not own_only or tenant == principal.tenant.name)


def may_manage_keys(principal: Principal, role: str) -> bool:
    """Whether a principal may create, replace or revoke keys of a role.

    A tenant administrator must not manage keys with the role operator, because with such a key the administrator would
    become an operator.
    """
    return principal.role == "operator" or (principal.role == "tenant_admin" and role in ("caller", "tenant_admin"))


def admin_token(secret: bytes) -> str:
    """Return the credential for the admin port, derived from the cluster's secret. The commands of a local cluster use
    it."""
    return f"{KEY_PREFIX}admin_{derive(secret, 'admin-token').hex()}"


def derive(secret: bytes, purpose: str, *parts: str | bytes) -> bytes:
    """Derive 32 bytes for one purpose from a secret.

    `parts` are further inputs. Each is prefixed with its length, so that different lists of parts never collide.
    """
    message = bytearray()
    for part in (f"headrace/{purpose}", *parts):
        raw = part.encode() if isinstance(part, str) else part
        message += len(raw).to_bytes(8, "big") + raw
    return hmac.digest(secret, bytes(message), "sha256")


def key_number(secret: bytes) -> str:
    """Return the public number of a secret, by which the secret is found in a list. It has 8 hex digits and does not
    reveal the secret."""
    return derive(secret, "key-number")[:4].hex()


def tenant_handle(secrets: Sequence[bytes], tenant: str) -> str:
    """Return the pseudonym of a tenant for workers, 32 hex digits. Gateways with the same first secret return the same
    pseudonym."""
    return derive(secrets[0], "tenant-handle", tenant)[:16].hex()


def cache_salt(secrets: Sequence[bytes], policy: TenantPolicy, client_salt: str = "") -> str:
    """Return the prefix-cache salt for a tenant's calls, 64 hex digits. The salt is never sent to clients.

    Two tenants share cached prefixes only if an operator has given both the same cache_group. A group and a tenant of
    the same name have different salts. `client_salt` divides the cache of the client's own tenant or group further; it
    gives no access to another cache.
    """
    owner = ("group", policy.cache_group) if policy.cache_group else ("tenant", policy.name)
    return derive(secrets[0], "cache-salt", *owner, key_number(secrets[0]), client_salt).hex()


def verify_any(secrets: Sequence[bytes], purpose: str, tag: bytes, *parts: str | bytes) -> bool:
    """Whether `tag` was derived from any of the secrets. All secrets are tried, to take constant time."""
    good = False
    for secret in secrets:
        good |= hmac.compare_digest(derive(secret, purpose, *parts), tag)
    return good
