"""OIDC tokens. Tokens of a real issuer are accepted; forged, foreign, expired and malformed tokens are refused at
little cost."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import jwt
import oidc_provider_mock  # type: ignore[import-untyped]
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.auth import bearer_tokens, oidc
from cluster.gateway.auth.bearer_tokens import TokenRefused
from cluster.gateway.auth.no_redirect import open_no_redirect
from cluster.gateway.auth.oidc import Issuer, OidcVerifier, TokenClaims
from cluster.policy.tenants.identity import BAD_KEY
from tests.support.cpu import cpu_within

NOW = 1_800_000_000.0
ISSUER = "https://sso.example.com/"
RSA_KEY = rsa.generate_private_key(65537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
WEAK_KEY = rsa.generate_private_key(65537, 1024)  # noqa: S505 - weak on purpose


class RealIssuer:
    """An issuer that runs oidc-provider-mock. The issuer can be restarted, and each start makes new keys."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        """URL of the issuer, which is also the issuer's name."""
        return f"http://localhost:{self.port}"

    def start(self) -> None:
        """Start the issuer, which has users of two tenants."""
        users = [
            oidc_provider_mock.User(sub="ada", claims={"org": "acme", "headrace_role": "operator"}),
            oidc_provider_mock.User(sub="bob", claims={"nested": {"org": "b"}}),
        ]
        server = oidc_provider_mock.run_server_in_thread(self.port, user_claims=users)
        self.port = self._stack.enter_context(server).server_port

    def stop(self) -> None:
        """Stop the issuer."""
        self._stack.close()

    def token(self, user: str, audience: str = "headrace") -> str:
        """Return an ID token from the authorization code flow, as an application in a browser would get it."""
        back = "http://localhost/back"
        query = {"client_id": audience, "redirect_uri": back, "response_type": "code", "scope": "openid"}
        code = urllib.parse.parse_qs(
            urllib.parse.urlsplit(self._post(f"/oauth2/authorize?{urllib.parse.urlencode(query)}", {"sub": user})).query
        )["code"][0]
        form = {"grant_type": "authorization_code", "code": code, "redirect_uri": back}
        answer = self._post("/oauth2/token", {**form, "client_id": audience, "client_secret": "x"})
        return str(json.loads(answer)["id_token"])

    def _post(self, path: str, form: Mapping[str, str]) -> str:
        """Send a form and return the response body, or the target of a redirect."""
        request = urllib.request.Request(self.url + path, urllib.parse.urlencode(form).encode())  # noqa: S310 - loopback
        try:
            with open_no_redirect(request, 10) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                return str(error.headers["location"])


@pytest.fixture
def real() -> Iterator[RealIssuer]:
    """Provide a running real issuer on loopback."""
    issuer = RealIssuer()
    yield issuer
    issuer.stop()


class Clock:
    """The wall clock and the monotonic clock of a verifier."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


class Scripted:
    """An issuer whose documents are set by the test."""

    def __init__(self, *keys: dict[str, Any]) -> None:
        self.keys = list(keys)
        self.fetched = 0
        self.away = False
        self.discovery: dict[str, Any] = {"issuer": ISSUER, "jwks_uri": "https://sso.example.com/keys"}

    async def fetch(self, url: str) -> Mapping[str, Any]:
        """Return the discovery document or the keys."""
        self.fetched += 1
        await asyncio.sleep(0)
        if self.away:
            raise OSError("no route")
        return self.discovery if url.endswith("openid-configuration") else {"keys": self.keys}


def public(key: Any, key_id: str = "k1", **extra: Any) -> dict[str, Any]:
    """Return the public key as a JWK."""
    kinds: dict[type, Any] = {
        rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm,
        ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm,
        ed25519.Ed25519PrivateKey: jwt.algorithms.OKPAlgorithm,
    }
    (algorithm,) = [value for kind, value in kinds.items() if isinstance(key, kind)]
    named = {"kid": key_id} if key_id else {}
    return {**json.loads(algorithm.to_jwk(key.public_key())), **named, **extra}


def sign(key: Any = RSA_KEY, algorithm: str = "RS256", key_id: str | None = "k1", **changes: Any) -> str:
    """Return a signed token. Claims that are None are left out."""
    body = {"iss": ISSUER, "aud": "headrace", "sub": "ada", "org": "acme", "exp": NOW + 60, "iat": NOW, **changes}
    headers = {} if key_id is None else {"kid": key_id}
    return jwt.encode({k: v for k, v in body.items() if v is not None}, key, algorithm, headers=headers)


@pytest.fixture
def clock() -> Clock:
    """Provide a clock that the test moves."""
    return Clock()


@pytest.fixture
def scripted() -> Scripted:
    """Provide a scripted issuer with one RSA key."""
    return Scripted(public(RSA_KEY))


@pytest.fixture
def verifier(scripted: Scripted, clock: Clock) -> OidcVerifier:
    """Provide a verifier for the scripted issuer."""
    issuer = Issuer(ISSUER, "headrace", "org", "headrace_role")
    return OidcVerifier([issuer], fetch=scripted.fetch, wall=clock, monotonic=clock)


async def reason(verifier: OidcVerifier, token: str) -> str:
    """Return the reason for which a token is refused. Asserts that the caller gets the same message as for a bad
    key."""
    with pytest.raises(TokenRefused) as caught:
        await verifier.verify(token)
    assert caught.value.outcome is Outcome.UNAUTHENTICATED_KEY
    assert caught.value.message == BAD_KEY
    return caught.value.reason


async def test_tokens_of_a_real_issuer(real: RealIssuer) -> None:
    """A token's tenant is the value of the claim that the settings name. The name may be a path into nested claims. A
    token without this claim, or for another audience, is refused."""
    verifier = OidcVerifier([Issuer(real.url, "headrace", "org", "headrace_role")])
    claims = await verifier.verify(real.token("ada"))
    assert (claims.tenant, claims.role, claims.subject, claims.issuer) == ("acme", "operator", "ada", real.url)
    assert claims.expires_at_s > time.time()
    assert await reason(verifier, real.token("bob")) == "no_tenant"
    assert await reason(verifier, real.token("ada", audience="other")) == "audience"
    nested = OidcVerifier([Issuer(real.url, "headrace", "nested.org")])
    assert (await nested.verify(real.token("bob"))).tenant == "b"
    await verifier.close()


async def test_a_real_issuer_renews_its_keys(real: RealIssuer) -> None:
    """After the issuer's restart with new keys, new tokens are accepted once the keys may be fetched again, and old
    tokens are refused."""
    clock = Clock()
    verifier = OidcVerifier([Issuer(real.url, "headrace", "org")], monotonic=clock)
    old = real.token("ada")
    await verifier.verify(old)
    real.stop()
    real.start()
    new = real.token("ada")
    assert await reason(verifier, new) in ("unknown_key", "bad_signature")
    clock.now += oidc.KEY_AGE_S + 1
    for _ in range(50):  # without key ids the old key is tried while the new keys are being fetched
        try:
            assert (await verifier.verify(new)).tenant == "acme"
            break
        except TokenRefused:
            clock.now += oidc.MIN_REFETCH_S
            await asyncio.gather(*verifier._refreshing)
    else:
        pytest.fail("the new keys were never fetched")
    assert await reason(verifier, old) in ("unknown_key", "bad_signature")
    await verifier.close()


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [
        (RSA_KEY, "RS256"),
        (RSA_KEY, "PS512"),
        (EC_KEY, "ES256"),
        (ed25519.Ed25519PrivateKey.generate(), "EdDSA"),
    ],
)
async def test_the_algorithms_that_are_allowed(
    verifier: OidcVerifier, scripted: Scripted, key: Any, algorithm: str
) -> None:
    """Tokens signed with RSA, elliptic curves and Ed25519 are accepted, with and without a key id."""
    scripted.keys = [public(key)]
    expected = TokenClaims(ISSUER, "ada", "acme", "viewer", NOW + 60)
    assert await verifier.verify(sign(key, algorithm, headrace_role="viewer")) == expected
    assert await verifier.verify(sign(key, algorithm, None, headrace_role="viewer")) == expected


async def test_no_signature_and_a_public_key_as_a_secret(verifier: OidcVerifier, scripted: Scripted) -> None:
    """Tokens with alg=none, in any spelling, are refused. An HMAC token is refused if its secret is the issuer's public
    key in any form.

    The gateway refuses these tokens without fetching the issuer's keys.
    """
    good = sign()
    _, body, signature = good.split(".")
    for word in ("none", "None", "NONE", "", "nOnE"):
        head = base64.urlsafe_b64encode(json.dumps({"alg": word, "typ": "JWT", "kid": "k1"}).encode()).rstrip(b"=")
        for end in ("", signature):
            assert await reason(verifier, f"{head.decode()}.{body}.{end}") in ("algorithm", "malformed")
    pem = RSA_KEY.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    secrets = [pem, pem.strip(), json.dumps(public(RSA_KEY)).encode()]
    for secret in secrets:
        for algorithm, digest in (("HS256", "sha256"), ("HS512", "sha512")):
            assert await reason(verifier, _hmac_token(algorithm, digest, secret, body)) == "algorithm"
    assert scripted.fetched == 0


def _hmac_token(algorithm: str, digest: str, secret: bytes, body: str) -> str:
    """Return a JWT that is signed with HMAC. The test makes it by hand, because the JWT library refuses to sign with a
    public key as the secret."""
    head = base64.urlsafe_b64encode(json.dumps({"alg": algorithm, "kid": "k1"}).encode()).rstrip(b"=").decode()
    tag = hmac.digest(secret, f"{head}.{body}".encode(), digest)
    return f"{head}.{body}.{base64.urlsafe_b64encode(tag).rstrip(b'=').decode()}"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"key": EC_KEY, "algorithm": "ES256"}, "bad_signature"),
        ({"key": rsa.generate_private_key(65537, 2048)}, "bad_signature"),
        ({"iss": "https://evil.example.com/"}, "unknown_issuer"),
        ({"iss": ISSUER.rstrip("/")}, "unknown_issuer"),
        ({"iss": None}, "unknown_issuer"),
        ({"aud": "other"}, "audience"),
        ({"aud": None}, "malformed"),
        ({"exp": None}, "malformed"),
        ({"sub": "ada\x1b]0;owned\x07"}, "malformed"),
        ({"sub": "ada\nbob"}, "malformed"),
        ({"sub": "ada\u009b2J"}, "malformed"),
        ({"sub": "ada\u202egpj"}, "malformed"),
        ({"sub": "a" * 513}, "malformed"),
        ({"exp": NOW - 31}, "expired"),
        ({"exp": 1e300}, "expired"),
        ({"nbf": NOW + 31}, "not_yet"),
        ({"iat": NOW + 31}, "not_yet"),
        ({"org": None}, "no_tenant"),
        ({"org": ""}, "no_tenant"),
        ({"org": ["acme"]}, "no_tenant"),
        ({"org": {"a": 1}}, "no_tenant"),
        ({"key_id": "other"}, "unknown_key"),
    ],
)
async def test_tokens_that_are_refused(verifier: OidcVerifier, changes: dict[str, Any], word: str) -> None:
    """A token with a wrong key, issuer, audience, time or shape is refused with a separate reason for each fault."""
    assert await reason(verifier, sign(**changes)) == word


async def test_garbage_is_refused(verifier: OidcVerifier, scripted: Scripted) -> None:
    """Empty, truncated, huge, deeply nested and mistyped tokens, and tokens with surrogates, raise only
    TokenRefused."""
    good = sign()

    def part(value: Any) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    deep = base64.urlsafe_b64encode(b"[" * 3000).decode()
    for token in (
        "",
        "eyJ",
        "a.b.c",
        good[:20],
        good.rsplit(".", 1)[0],
        good + ".x",
        f"{part({'alg': 'RS256', 'kid': 5})}.{part({'iss': ISSUER})}.AA",
        f"{part({'alg': 'RS256', 'crit': ['x']})}.{part({'iss': ISSUER})}.AA",
        f"{part({'alg': ['RS256']})}.{part({'iss': ISSUER})}.AA",
        f"{part({'alg': 'RS256'})}.{part({'iss': [ISSUER]})}.AA",
        f"{part({'alg': 'RS256'})}.{part([1])}.AA",
        f"{part('x')}.{part({'iss': ISSUER})}.AA",
        f"{part({'alg': 'RS256'})}.{deep}.AA",
        "eyJ\ud800.\ud800.x",
    ):
        assert await reason(verifier, token)
    huge = "eyJ" + "x" * 64_000_000
    with cpu_within(0.5):
        assert await reason(verifier, huge) == "too_long"
    assert scripted.fetched == 0


async def test_a_truncated_signature(verifier: OidcVerifier) -> None:
    """A token with a truncated signature is refused, and afterwards a valid token is still accepted."""
    assert await reason(verifier, sign()[:-4]) in ("bad_signature", "malformed")
    assert (await verifier.verify(sign())).tenant == "acme"


@pytest.mark.filterwarnings("ignore:The RSA key is 1024 bits long")
async def test_keys_that_may_not_sign(verifier: OidcVerifier, scripted: Scripted, clock: Clock) -> None:
    """Weak keys, encryption keys, shared secrets and invalid entries of a key set are skipped."""
    secret = {"kty": "oct", "k": "AAAA", "kid": "k3"}
    scripted.keys = [
        public(WEAK_KEY, "k1"),
        public(RSA_KEY, "k2", use="enc"),
        secret,
        {"kty": "RSA"},
        {},
        {"kty": "EC", "crv": "x", "kid": "k4"},
        public(RSA_KEY, "good"),
    ]
    for key, key_id in ((WEAK_KEY, "k1"), (RSA_KEY, "k2"), (RSA_KEY, "k3"), (RSA_KEY, "k4")):
        assert await reason(verifier, sign(key, key_id=key_id)) == "unknown_key"
    assert (await verifier.verify(sign(key_id="good"))).tenant == "acme"


async def test_a_key_on_another_curve_is_skipped(verifier: OidcVerifier, scripted: Scripted) -> None:
    """A token whose algorithm needs another curve than the issuer's key is refused like any bad token. If the issuer
    has keys on several curves, a token without a key id is checked with the others."""
    wide = ec.generate_private_key(ec.SECP384R1())
    scripted.keys = [public(EC_KEY, "k1")]
    assert await reason(verifier, sign(wide, "ES384")) == "bad_signature"
    scripted.keys = [public(wide, "k2"), public(EC_KEY, "k1")]
    other = OidcVerifier([Issuer(ISSUER, "headrace", "org", "headrace_role")], fetch=scripted.fetch, wall=lambda: NOW)
    assert (await other.verify(sign(EC_KEY, "ES256", key_id=None))).tenant == "acme"


@pytest.mark.slow
async def test_rotation_and_the_pause_between_fetches(verifier: OidcVerifier, scripted: Scripted, clock: Clock) -> None:
    """A new key id causes one fetch, and thousands of unknown key ids cause at most one fetch in MIN_REFETCH_S."""
    await verifier.verify(sign())
    before = scripted.fetched
    assert before == 2
    scripted.keys = [public(RSA_KEY, "k2")]
    for at in range(1000):
        assert await reason(verifier, sign(key_id=f"x{at}")) == "unknown_key"
    assert scripted.fetched == before
    clock.now += oidc.MIN_REFETCH_S
    found = await asyncio.gather(*(verifier.verify(sign(key_id="k2", n=n)) for n in range(20)))
    assert {one.tenant for one in found} == {"acme"}
    assert scripted.fetched == before + 2
    clock.now += oidc.CACHE_S
    assert await reason(verifier, sign(key_id="k1", exp=NOW + 1000)) == "unknown_key"


async def test_an_issuer_that_is_away(verifier: OidcVerifier, scripted: Scripted, clock: Clock) -> None:
    """While the issuer is unreachable, a verifier without keys raises STORE_UNAVAILABLE. Known keys stay valid for a
    day, and renewals are tried in the background. After the day the keys expire."""
    scripted.away = True
    with pytest.raises(CallError) as caught:
        await verifier.verify(sign())
    assert caught.value.outcome is Outcome.STORE_UNAVAILABLE
    scripted.away = False
    clock.now += oidc.MIN_REFETCH_S
    await verifier.verify(sign(exp=NOW + 1e6))
    scripted.away = True
    clock.now += oidc.MAX_KEY_AGE_S - 1
    assert (await verifier.verify(sign(exp=NOW + 1e6, n=1))).tenant == "acme"
    await asyncio.gather(*verifier._refreshing)
    clock.now += oidc.MIN_REFETCH_S
    with pytest.raises(CallError) as caught:
        await verifier.verify(sign(exp=NOW + 1e6, n=2))
    assert caught.value.outcome is Outcome.STORE_UNAVAILABLE


@pytest.mark.parametrize(
    "change",
    [
        {"issuer": "https://evil.example.com/"},
        {"jwks_uri": "http://sso.example.com/keys"},
        {"jwks_uri": "file:///etc/passwd"},
        {"jwks_uri": ""},
    ],
)
async def test_a_discovery_document_that_leads_astray(
    verifier: OidcVerifier, scripted: Scripted, change: dict[str, Any]
) -> None:
    """A discovery document that names another issuer, or places the keys at an unprotected URL, is refused."""
    scripted.discovery |= change
    with pytest.raises(CallError) as caught:
        await verifier.verify(sign())
    assert caught.value.outcome is Outcome.STORE_UNAVAILABLE


async def test_a_verified_token_is_remembered_no_longer_than_it_lives(
    verifier: OidcVerifier, scripted: Scripted, clock: Clock
) -> None:
    """A token that is presented again within CACHE_S is not verified again, but is refused once it has expired."""
    token = sign(exp=NOW + 20)
    await verifier.verify(token)
    scripted.keys = []
    assert (await verifier.verify(token)).tenant == "acme"
    clock.now += 51
    assert await reason(verifier, token) == "expired"


def test_which_tokens_are_for_this_module() -> None:
    """A JWT is distinguished from an API key by its first characters."""
    looks: Callable[[str], bool] = bearer_tokens.looks_like_jwt
    assert [looks(sign()), looks("hr_k1_abc"), looks("sk-eyJ"), looks("")] == [True, False, False, False]


@pytest.mark.parametrize("url", ["http://example.com/", "ftp://localhost/", "https://", "", "//localhost"])
def test_documents_come_over_tls(url: str) -> None:
    """An issuer's documents are fetched over https only, except from this host, where plain http is allowed."""
    with pytest.raises(ValueError, match="https"):
        oidc.check_url(url)
    assert oidc.check_url("http://127.0.0.1:1/x")
    assert oidc.check_url("http://[::1]:1/x")
