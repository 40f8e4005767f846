"""Verification of JSON Web Tokens from the configured OpenID issuers. A verified token yields a tenant, a role and a
subject.

Only the issuers' own keys and the asymmetric algorithms in ALGORITHMS are trusted. Tokens with the algorithm `none`, or
with HS256 and a public key as the secret, are therefore refused before any key is looked up. The keys are fetched over
TLS from the address in the issuer's discovery document. Tokens with unknown key ids cause at most one fetch per issuer
in MIN_REFETCH_S. While an issuer is unreachable, known keys stay valid for MAX_KEY_AGE_S. The length of a token is
checked first, so a token of a megabyte costs nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any

import jwt
import structlog
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.auth.bearer_tokens import TokenRefused
from cluster.gateway.auth.no_redirect import open_no_redirect
from cluster.policy.tenants.identity import is_subject

log = structlog.get_logger("oidc")

ALGORITHMS = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"})
MAX_TOKEN_BYTES = 16 * 1024
MAX_DOCUMENT_BYTES = 1024 * 1024
MAX_KEYS = 100
MIN_RSA_BITS = 2048
LEEWAY_S = 30.0
KEY_AGE_S = 300.0
MAX_KEY_AGE_S = 86400.0
MIN_REFETCH_S = 10.0
FETCH_TIMEOUT_S = 5.0
CACHE_S = 60.0
MAX_CACHED = 4096

Fetch = Callable[[str], Awaitable[Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class Issuer:
    """A configured issuer. The issuer named in a token must equal `issuer` exactly. Claim names may be paths
    (`realm_access.tenant`)."""

    issuer: str
    audience: str
    tenant_claim: str
    role_claim: str = ""
    algorithms: frozenset[str] = ALGORITHMS


@dataclass(frozen=True, slots=True)
class TokenClaims:
    """The claims of a verified token. `expires_at_s` is in seconds since the epoch."""

    issuer: str
    subject: str
    tenant: str
    role: str
    expires_at_s: float


@dataclass(frozen=True, slots=True)
class _Key:
    """A public key of an issuer. `algorithm`: the only algorithm that the issuer allows for this key; "" if every
    algorithm of the key's kind is allowed."""

    id: str
    kind: str
    algorithm: str
    public: Any

    def fits(self, algorithm: str) -> bool:
        """Return whether the key may verify tokens with this algorithm."""
        return self.algorithm in ("", algorithm) and algorithm.startswith(_SIGNS[self.kind])


_SIGNS: Mapping[str, tuple[str, ...]] = {"RSA": ("RS", "PS"), "EC": ("ES",), "OKP": ("EdDSA",)}


@dataclass(slots=True)
class _Keys:
    """The keys of an issuer, and the monotonic times of the last successful fetch and of the last attempt."""

    known: tuple[_Key, ...] = ()
    fetched_at: float = -float("inf")
    tried_at: float = -float("inf")
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class OidcVerifier:
    """Verifier of tokens from the configured issuers. A verifier belongs to one event loop. `wall` returns seconds
    since the epoch."""

    def __init__(
        self,
        issuers: Sequence[Issuer],
        *,
        fetch: Fetch | None = None,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._issuers = {issuer.issuer: issuer for issuer in issuers}
        self._fetch = fetch or fetch_json
        self._wall = wall
        self._monotonic = monotonic
        self._keys = {name: _Keys() for name in self._issuers}
        self._cache: dict[bytes, tuple[float, TokenClaims]] = {}
        self._refreshing: set[asyncio.Task[None]] = set()

    async def verify(self, token: str) -> TokenClaims:
        """Verify a token and return its claims. Raises TokenRefused, or CallError STORE_UNAVAILABLE while the issuer's
        keys cannot be fetched."""
        if len(token) > MAX_TOKEN_BYTES:
            raise TokenRefused("too_long")
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        cached = self._cache.get(digest)
        if cached is not None and self._monotonic() < cached[0] and self._wall() < cached[1].expires_at_s:
            return cached[1]
        claims = await self._verify(token)
        if len(self._cache) >= MAX_CACHED:
            self._cache.clear()
        self._cache[digest] = (self._monotonic() + CACHE_S, claims)
        return claims

    async def _verify(self, token: str) -> TokenClaims:
        header, issuer = self._unverified(token)
        algorithm = header["alg"]
        candidates = await self._candidates(issuer, header.get("kid", ""))
        for key in (candidate for candidate in candidates if candidate.fits(algorithm)):
            try:
                body = jwt.decode(
                    token,
                    key.public,
                    algorithms=[algorithm],
                    audience=issuer.audience,
                    issuer=issuer.issuer,
                    # _claims checks the times, against self._wall
                    options={
                        "require": ["exp", "iss", "aud"],
                        "verify_exp": False,
                        "verify_nbf": False,
                        "verify_iat": False,
                    },
                )
            except (jwt.InvalidSignatureError, jwt.InvalidKeyError):  # such as a key on another curve
                continue
            except jwt.PyJWTError as error:
                raise TokenRefused(_reason(error)) from None
            return self._claims(issuer, body)
        raise TokenRefused("bad_signature")

    def _unverified(self, token: str) -> tuple[dict[str, Any], Issuer]:
        """Return the header of an unverified token, and the issuer that the token names. Raises TokenRefused if the
        header or the issuer is unacceptable."""
        try:
            header = jwt.get_unverified_header(token)
            body = jwt.decode(token, options={"verify_signature": False, "verify_exp": False, "verify_aud": False})
        except (jwt.InvalidTokenError, ValueError, RecursionError):
            raise TokenRefused("malformed") from None
        issuer = self._issuers.get(body.get("iss", "")) if isinstance(body.get("iss"), str) else None
        if issuer is None:
            raise TokenRefused("unknown_issuer")
        algorithm = header.get("alg")
        if not isinstance(algorithm, str) or algorithm not in ALGORITHMS & issuer.algorithms:
            raise TokenRefused("algorithm")
        if "crit" in header or not isinstance(header.get("kid", ""), str):
            raise TokenRefused("malformed")
        return header, issuer

    def _claims(self, issuer: Issuer, body: Mapping[str, Any]) -> TokenClaims:
        now = self._wall()
        expires_at_s = _seconds(body, "exp")
        if expires_at_s is None or now >= expires_at_s + LEEWAY_S:
            raise TokenRefused("expired")
        for name in ("nbf", "iat"):
            if name in body and now < (_seconds(body, name) or 0.0) - LEEWAY_S:
                raise TokenRefused("not_yet")
        tenant = _claim(body, issuer.tenant_claim)
        if not isinstance(tenant, str) or not tenant:
            raise TokenRefused("no_tenant")
        role = _claim(body, issuer.role_claim) if issuer.role_claim else ""
        subject = body.get("sub", "")
        if not isinstance(subject, str) or not is_subject(subject):
            raise TokenRefused("malformed")
        return TokenClaims(issuer.issuer, subject, tenant, role if isinstance(role, str) else "", expires_at_s)

    async def _candidates(self, issuer: Issuer, key_id: str) -> Sequence[_Key]:
        """Return the keys that may have signed a token. If the token names a key, only keys with that id are returned,
        else all keys of the issuer."""
        keys = self._keys[issuer.issuer]
        age_s = self._monotonic() - keys.fetched_at
        candidates = _pick(keys, key_id)
        if candidates and age_s < MAX_KEY_AGE_S:
            if age_s >= KEY_AGE_S:
                self._refresh_soon(issuer)
            return candidates
        await self._refresh(issuer)
        if self._monotonic() - keys.fetched_at >= MAX_KEY_AGE_S:
            raise CallError(
                Outcome.STORE_UNAVAILABLE, "the keys of this token's issuer cannot be fetched at the moment; retry"
            )
        candidates = _pick(keys, key_id)
        if not candidates:
            raise TokenRefused("unknown_key")
        return candidates

    def _refresh_soon(self, issuer: Issuer) -> None:
        if not self._keys[issuer.issuer].lock.locked():
            task = asyncio.get_running_loop().create_task(self._refresh(issuer))
            self._refreshing.add(task)
            task.add_done_callback(self._refreshing.discard)

    async def _refresh(self, issuer: Issuer) -> None:
        """Fetch the issuer's keys. Does nothing if the last attempt was less than MIN_REFETCH_S ago. If the fetch
        fails, the old keys stay."""
        keys = self._keys[issuer.issuer]
        async with keys.lock:
            if self._monotonic() - keys.tried_at < MIN_REFETCH_S:
                return
            keys.tried_at = self._monotonic()
            try:
                async with asyncio.timeout(2 * FETCH_TIMEOUT_S):
                    fetched = await self._fetch_keys(issuer)
            except (OSError, ValueError, HTTPException, TimeoutError) as error:
                log.warning("oidc.keys_not_fetched", issuer=issuer.issuer, error=str(error))
                return
            keys.known = tuple(fetched)
            keys.fetched_at = self._monotonic()

    async def _fetch_keys(self, issuer: Issuer) -> list[_Key]:
        discovery = await self._fetch(issuer.issuer.rstrip("/") + "/.well-known/openid-configuration")
        if discovery.get("issuer") != issuer.issuer:
            raise ValueError(f"its discovery document says it is {discovery.get('issuer')!r}")
        document = await self._fetch(check_url(str(discovery.get("jwks_uri", ""))))
        entries = document.get("keys")
        if not isinstance(entries, list) or len(entries) > MAX_KEYS:
            raise ValueError(f"its key set is no list of at most {MAX_KEYS} keys")
        keys = [key for entry in entries if (key := _key(entry)) is not None]
        if not keys:
            raise ValueError("its key set holds no key that may sign")
        return keys

    async def close(self) -> None:
        """Cancel all running fetches."""
        for task in list(self._refreshing):
            task.cancel()
        await asyncio.gather(*self._refreshing, return_exceptions=True)


def _key(entry: object) -> _Key | None:
    """Return the public signing key in an entry of a key set; None for shared secrets, encryption keys, weak keys and
    unknown kinds of keys."""
    if not isinstance(entry, Mapping) or entry.get("kty") not in _SIGNS or entry.get("use") == "enc":
        return None
    try:
        key = jwt.PyJWK(dict(entry))
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        return None
    if isinstance(key.key, RSAPublicKey) and key.key.key_size < MIN_RSA_BITS:
        return None
    return _Key(str(entry.get("kid", "")), str(entry["kty"]), str(entry.get("alg", "")), key.key)


def _pick(keys: _Keys, key_id: str) -> list[_Key]:
    return [key for key in keys.known if not key_id or key.id == key_id]


def _claim(body: Mapping[str, Any], path: str) -> Any:
    """Return the value of a claim; None if the claim is absent. `path`: the name of a claim, or a dotted path to a
    nested claim."""
    if path in body:
        return body[path]
    value: Any = body
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _seconds(body: Mapping[str, Any], name: str) -> float | None:
    value = body.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TokenRefused("malformed")
    return float(value) if abs(value) < 1e15 else None


def _reason(error: jwt.PyJWTError) -> str:
    reasons: Mapping[type, str] = {
        jwt.InvalidAudienceError: "audience",
        jwt.InvalidIssuerError: "unknown_issuer",
        jwt.MissingRequiredClaimError: "malformed",
        jwt.InvalidAlgorithmError: "algorithm",
    }
    return reasons.get(type(error), "malformed")


def check_url(url: str) -> str:
    """Return the URL unchanged if it uses https or names this host. Raises ValueError for any other URL."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme == "https" and host:
        return url
    if parts.scheme == "http" and (host == "localhost" or _is_loopback(host)):
        return url
    raise ValueError(f"{url!r}: an issuer's documents come over https (or from this host)")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def fetch_json(url: str) -> Mapping[str, Any]:
    """Fetch a JSON object over HTTP. Raises OSError, ValueError or HTTPException."""
    return await asyncio.to_thread(_get, check_url(url))


def _get(url: str) -> Mapping[str, Any]:
    with open_no_redirect(url, FETCH_TIMEOUT_S) as answer:
        data = answer.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise ValueError(f"{url} sends more than {MAX_DOCUMENT_BYTES} bytes")
    value = json.loads(data)
    if not isinstance(value, Mapping):
        raise ValueError(f"{url} sends no JSON object")
    return value
