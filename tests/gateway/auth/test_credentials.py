"""Authentication of a call. The credentials of a call yield one principal, or one refusal that reveals nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.auth.credentials import CredentialChecker
from cluster.gateway.auth.oidc import Issuer, OidcVerifier
from cluster.policy.tenants.identity import (
    BAD_KEY,
    AccessSnapshot,
    CertificateRule,
    KeyEntry,
    Principal,
    TenantEntry,
    digest_of,
    make_key,
    sha256_of,
)
from cluster.policy.tenants.policy import TenantPolicy

NOW = 1_800_000_000.0
PEPPER = b"p" * 32
KEY = make_key("k1", hashlib.sha256(b"1").digest())
ISSUER = "https://sso.example.com/"
SIGNING = ed25519.Ed25519PrivateKey.generate()
SPIFFE = "URI:spiffe://example.com/ns/billing"


async def documents(url: str) -> Mapping[str, Any]:
    """Return the issuer's discovery document or keys."""
    if url.endswith("openid-configuration"):
        return {"issuer": ISSUER, "jwks_uri": "https://sso.example.com/keys"}
    return {"keys": [jwt.algorithms.OKPAlgorithm.to_jwk(SIGNING.public_key(), as_dict=True)]}


def token(tenant: str) -> str:
    """Return a valid token for an operator of a tenant."""
    body = {"iss": ISSUER, "aud": "headrace", "sub": "ada", "org": tenant, "role": "operator", "exp": NOW + 60}
    return jwt.encode(body, SIGNING, "EdDSA")


class World:
    """A CredentialChecker, and the failures that the checker has reported."""

    def __init__(self, *, oidc: bool = True) -> None:
        self.failures: list[tuple[str, str, str]] = []
        tenants = [TenantEntry(TenantPolicy(n, suspended=n == "gone")) for n in ("acme", "billing", "gone")]
        key = KeyEntry("k1", "acme", digest_of(sha256_of(KEY), PEPPER))
        self.snapshot = AccessSnapshot.of(tenants, [key])
        issuer = Issuer(ISSUER, "headrace", "org", "role")
        self.authenticator = CredentialChecker(
            lambda: self.snapshot,
            peppers=(PEPPER,),
            oidc=OidcVerifier([issuer], fetch=documents, wall=lambda: NOW) if oidc else None,
            certificates=[CertificateRule("spiffe://example.com/ns/billing", "billing")],
            on_failure=lambda reason, subject, peer: self.failures.append((reason, subject, peer)),
            clock=lambda: NOW,
        )

    async def principal(self, *authorization: str, names: tuple[str, ...] = ()) -> Principal:
        """Return the principal for these credentials."""
        return await self.authenticator.principal(authorization, names, "10.0.0.9")

    async def refused(self, *authorization: str, names: tuple[str, ...] = ()) -> CallError:
        """Return the error with which these credentials are refused. `names`: the names in the client certificate."""
        with pytest.raises(CallError) as caught:
            await self.principal(*authorization, names=names)
        return caught.value


async def test_keys_tokens_and_certificates() -> None:
    """A key, a token and a certificate each yield a tenant, a role and a subject. The case of the authorization scheme
    does not matter."""
    world = World()
    key = await world.principal(f"Bearer {KEY}")
    assert (key.tenant.name, key.by, key.subject, key.role) == ("acme", "key", "k1", "caller")
    assert (await world.principal(f"bearer {KEY}")).tenant.name == "acme"
    claimed = await world.principal(f"Bearer {token('billing')}")
    assert (claimed.tenant.name, claimed.by, claimed.subject, claimed.role) == ("billing", "jwt", "ada", "operator")
    shown = await world.principal(names=("DNS:x", SPIFFE))
    assert (shown.tenant.name, shown.by, shown.role) == ("billing", "certificate", "caller")
    assert shown.subject == SPIFFE, "the audit names the alternative name that let it in"
    assert world.failures == []


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ((), "missing"),
        (("",), "missing"),
        (("Bearer",), "missing"),
        (("Bearer ",), "missing"),
        (("Basic eA==",), "missing"),
        ((f"Bearer {KEY}x",), "unknown"),
        ((f"Bearer {KEY[:-1]}",), "unknown"),
        ((f"Bearer  {KEY}",), "unknown"),
        ((f"Bearer {KEY}, Bearer {KEY}",), "unknown"),
        ((f"Bearer {KEY}\r\nx: y",), "unknown"),
        ((KEY,), "missing"),
        ((f"Bearer {KEY}", f"Bearer {KEY}"), "several"),
        ((f"Bearer {KEY}", "Bearer other"), "several"),
        (("Bearer " + "x" * 5_000_000,), "too_long"),
        (("Bearer eyJ.x.y",), "malformed"),
        ((f"Bearer {token('nobody')}",), "unknown"),
    ],
)
async def test_what_is_refused(values: tuple[str, ...], reason: str) -> None:
    """Each kind of wrong credentials (missing, mangled, duplicate, smuggled, foreign) is audited with a separate
    reason."""
    world = World()
    error = await world.refused(*values)
    assert error.outcome is Outcome.UNAUTHENTICATED_KEY
    assert [failure[0] for failure in world.failures] == [reason]
    assert world.failures[0][2] == "10.0.0.9"
    assert KEY not in error.message
    if reason != "missing":
        assert error.message == BAD_KEY


async def test_a_bad_token_is_not_saved_by_a_good_certificate() -> None:
    """If a call has a token, the token alone decides, even next to a valid certificate."""
    world = World()
    await world.refused("Bearer nonsense", names=(SPIFFE,))
    await world.refused("", names=(SPIFFE,))
    assert [failure[0] for failure in world.failures] == ["unknown", "missing"]


async def test_a_certificate_of_nobody() -> None:
    """A certificate that no rule names is refused with the same message as an invalid key. Only the audit names the
    certificate as the reason."""
    world = World()
    assert (await world.refused(names=("DNS:x",))).message == BAD_KEY
    assert world.failures[0][0] == "unknown_certificate"


async def test_a_suspended_tenant() -> None:
    """Every call of a suspended tenant is refused with the error for suspended tenants, whatever the kind of
    credentials."""
    world = World()
    assert (await world.refused(f"Bearer {token('gone')}")).outcome is Outcome.TENANT_SUSPENDED


async def test_without_issuers_a_jwt_is_a_bad_key() -> None:
    """A gateway without a configured issuer answers a JWT in the same way as a bad key."""
    world = World(oidc=False)
    assert (await world.refused(f"Bearer {token('acme')}")).message == BAD_KEY
    assert world.failures[0][0] == "unknown"


async def test_a_stale_snapshot_is_no_bad_key() -> None:
    """While the snapshot of the tenants is too old, the caller gets an error that allows a retry. No failed
    authentication is reported."""
    world = World()

    def stale() -> AccessSnapshot:
        raise CallError(Outcome.STORE_UNAVAILABLE, "away")

    authenticator = CredentialChecker(stale, peppers=(PEPPER,), on_failure=lambda *_: pytest.fail("blamed"))
    with pytest.raises(CallError) as caught:
        await authenticator.principal((f"Bearer {KEY}",))
    assert caught.value.outcome is Outcome.STORE_UNAVAILABLE
    assert world.failures == []
