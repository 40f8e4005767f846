"""Forged credentials over both APIs. All forged credentials are refused with the same message, and no other call is
delayed."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cluster.admin.v1 import tenants_pb2
from cluster.policy.tenants.identity import BAD_KEY
from cluster.wire.bundle import Bundle
from tests.support.admin import AdminClient
from tests.support.calls import chat, refused
from tests.support.cluster import sim_engine
from tests.support.http import Wire, chat_body
from tests.support.keyed import Keyed, bearer, keyed_cluster

SIGNING = ec.generate_private_key(ec.SECP256R1())
STRANGER = ec.generate_private_key(ec.SECP256R1())
PUBLIC = SIGNING.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


class _Issuer(BaseHTTPRequestHandler):
    """HTTP handler that serves an issuer's discovery document and keys."""

    def do_GET(self) -> None:
        if self.path.endswith("openid-configuration"):
            document: dict[str, Any] = {"issuer": issuer_of(self.server), "jwks_uri": f"{issuer_of(self.server)}keys"}
        else:
            document = {"keys": [jwt.algorithms.ECAlgorithm.to_jwk(SIGNING.public_key(), as_dict=True)]}
        content = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


def issuer_of(server: Any) -> str:
    """Return the issuer URL of a server."""
    return f"http://127.0.0.1:{server.server_port}/"


@pytest.fixture(scope="module")
def issuer() -> Iterator[str]:
    """Provide an issuer on this host."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Issuer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield issuer_of(server)
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
async def keyed(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, bundle: Bundle, issuer: str
) -> AsyncIterator[Keyed]:
    """Provide a gateway with keys and an issuer."""
    folder = tmp_path_factory.mktemp("forged")
    auth = (
        f"auth: {{cluster_secret_file: {folder / 'secret'}, api_keys: {{pepper_file: {folder / 'pepper'}}}, "
        f"oidc: [{{issuer: '{issuer}', audience: headrace, tenant_claim: org, role_claim: role}}]}}\n"
    )
    async with keyed_cluster(folder, auth) as keyed:
        await keyed.cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
        yield keyed
        await keyed.cluster.until_idle()


@pytest.fixture(scope="module")
async def key(keyed: Keyed) -> str:
    """Provide a valid key."""
    return await keyed.key("acme")


def token(iss: str, key: Any = SIGNING, **claims: Any) -> str:
    """Return an issuer's token for the tenant acme. Claims that are None are left out."""
    body = {"iss": iss, "aud": "headrace", "sub": "ada", "org": "acme", "exp": time.time() + 60, **claims}
    return jwt.encode({k: v for k, v in body.items() if v is not None}, key, "ES256")


def part(value: Any) -> str:
    """Return one part of a token, in its encoded form."""
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def unsigned(iss: str, algorithm: str) -> str:
    """Return a token without a signature. `algorithm` is a spelling of "none"."""
    body = {"iss": iss, "aud": "headrace", "org": "acme", "exp": time.time() + 60}
    return f"{part({'alg': algorithm, 'typ': 'JWT'})}.{part(body)}."


def with_public_key(iss: str) -> str:
    """Return an HS256 token whose HMAC key is the issuer's public key. A careless verifier would use that key as a
    shared secret."""
    body = {"iss": iss, "aud": "headrace", "org": "acme", "exp": time.time() + 60}
    text = f"{part({'alg': 'HS256', 'typ': 'JWT'})}.{part(body)}"
    return f"{text}.{part(hmac.digest(PUBLIC, text.encode(), hashlib.sha256))}"


FORGED: dict[str, Any] = {
    "an empty one": lambda key, iss: "",
    "a word": lambda key, iss: "letmein",
    "a truncated key": lambda key, iss: key[:-1],
    "a longer key": lambda key, iss: key + "A",
    "another's secret under this id": lambda key, iss: key[:-4] + "0000",
    "the key's id alone": lambda key, iss: key.rsplit("_", 1)[0],
    "the key in capitals": lambda key, iss: key.upper(),
    "two keys in one": lambda key, iss: f"{key}, Bearer {key}",
    "alg none": lambda key, iss: unsigned(iss, "none"),
    "alg None": lambda key, iss: unsigned(iss, "None"),
    "no alg": lambda key, iss: unsigned(iss, ""),
    "HS256 over the public key": lambda key, iss: with_public_key(iss),
    "a stranger's signature": lambda key, iss: token(iss, STRANGER),
    "an expired token": lambda key, iss: token(iss, exp=time.time() - 3600),
    "a token of tomorrow": lambda key, iss: token(iss, nbf=time.time() + 86400),
    "a token for somebody else": lambda key, iss: token(iss, aud="other"),
    "another issuer": lambda key, iss: token("https://evil.example.com/"),
    "no tenant": lambda key, iss: token(iss, org=None),
    "a tenant that is not there": lambda key, iss: token(iss, org="nobody"),
    "a tenant in a list": lambda key, iss: token(iss, org=["acme"]),
    "a truncated token": lambda key, iss: token(iss)[:-5],
    "a token of two parts": lambda key, iss: token(iss).rsplit(".", 1)[0],
    "a token that is no JSON": lambda key, iss: f"eyJ.{part(b'x')}.x",
    "60 kB": lambda key, iss: "hr_" + "x" * 60_000,
}


async def test_the_good_ones_come_in(keyed: Keyed, key: str, issuer: str) -> None:
    """Valid credentials are accepted. Without this result the other tests would prove nothing."""
    for good in (key, token(issuer)):
        assert (await keyed.cluster.stub.Chat(chat(), metadata=bearer(good))).choices
        assert (await keyed.fetch("/v1/chat/completions", chat_body(), key=good)).status == 200


@pytest.mark.parametrize("what", FORGED)
async def test_forged(keyed: Keyed, key: str, issuer: str, what: str) -> None:
    """All forged credentials are refused over both APIs with the same message."""
    forged = FORGED[what](key, issuer)
    answer = await refused(keyed.cluster.stub.Chat(chat(), metadata=bearer(forged)))
    assert (answer.code.name, answer.reason) == ("UNAUTHENTICATED", "UNAUTHENTICATED_KEY")
    reply = await keyed.fetch("/v1/chat/completions", chat_body(), authorization=f"Bearer {forged}")
    assert (reply.status, reply.error["code"]) == (401, "unauthenticated_key")
    if forged:
        assert answer.message == reply.error["message"] == BAD_KEY
    session = keyed.cluster.stub.Session(metadata=bearer(forged))
    assert (await session.code()).name == "UNAUTHENTICATED"


async def test_a_megabyte(keyed: Keyed, key: str) -> None:
    """Headers of a megabyte are not read to the end, and other calls are served meanwhile."""
    big = "hr_" + "x" * (1 << 20)
    wire = await Wire.open(keyed.cluster)
    wire.ask("/v1/models", authorization=f"Bearer {big}")
    status, _ = await asyncio.wait_for(wire.head(), 60)
    assert status == 400
    await wire.close()
    answer = await refused(keyed.cluster.stub.Chat(chat(), metadata=bearer(big), timeout=60))
    assert answer.code.name != "OK"
    assert (await keyed.cluster.stub.Chat(chat(), metadata=bearer(key))).choices


@pytest.mark.parametrize("good_first", [True, False])
async def test_smuggled(keyed: Keyed, key: str, good_first: bool) -> None:
    """A call with two authorization headers is refused, even if one of them is valid."""
    values = [f"Bearer {key}", "Bearer hr_x_y"]
    values = values if good_first else values[::-1]
    pairs = tuple(("authorization", value) for value in values)
    assert (await refused(keyed.cluster.stub.Chat(chat(), metadata=pairs))).reason == "UNAUTHENTICATED_KEY"
    wire = await Wire.open(keyed.cluster)
    lines = ["GET /v1/models HTTP/1.1", "host: test", *(f"authorization: {value}" for value in values)]
    wire.writer.write("\r\n".join(lines).encode() + b"\r\n\r\n")
    assert (await wire.reply()).status == 401
    await wire.close()


@pytest.mark.parametrize("value", ["{key}", "Basic {key}", "Bearer", "Token {key}"])
async def test_other_schemes(keyed: Keyed, key: str, value: str) -> None:
    """Only the form `Bearer KEY` is accepted, and the answer says how to send a key."""
    shown = value.format(key=key)
    answer = await refused(keyed.cluster.stub.Chat(chat(), metadata=(("authorization", shown),)))
    assert (answer.reason, "authorization: Bearer" in answer.message) == ("UNAUTHENTICATED_KEY", True)
    assert (await keyed.fetch("/v1/models", authorization=shown)).status == 401


async def test_another_tenants_key_is_that_tenants(keyed: Keyed, key: str) -> None:
    """A body or header that names another tenant has no effect, because the key alone determines the tenant."""
    other = await keyed.key("rival", models=["nothing"])
    for headers in ({"x-headrace-tenant": "acme"}, {"openai-organization": "acme"}):
        reply = await keyed.fetch("/v1/chat/completions", chat_body(user="acme"), key=other, **headers)
        assert reply.status == 404
    assert (
        await refused(keyed.cluster.stub.Chat(chat(user="acme"), metadata=bearer(other)))
    ).reason == "MODEL_NOT_FOUND"


async def test_nobodys_body_is_not_read(keyed: Keyed) -> None:
    """An unauthenticated call is refused after the headers, without waiting for the announced body."""
    wire = await Wire.open(keyed.cluster)
    wire.ask("/v1/chat/completions", b"", content_length="1000000", content_type="application/json")
    status, _ = await asyncio.wait_for(wire.head(), 60)
    assert status == 401
    await wire.close()


@pytest.mark.parametrize(
    ("claims", "code"),
    [
        ({"role": "operator"}, "OK"),
        ({"role": "viewer"}, "OK"),
        ({"role": "tenant_admin"}, "OK"),
        ({}, "PERMISSION_DENIED"),
        ({"role": "root"}, "PERMISSION_DENIED"),
        ({"role": ["operator"]}, "PERMISSION_DENIED"),
        ({"role": "operator", "exp": 1.0}, "UNAUTHENTICATED"),
        ({"role": "operator", "aud": "other"}, "UNAUTHENTICATED"),
        ({"role": "operator", "org": "nobody"}, "UNAUTHENTICATED"),
    ],
)
async def test_an_issuers_role_on_the_admin_port(
    keyed: Keyed, key: str, issuer: str, claims: dict[str, Any], code: str
) -> None:
    """On the admin port, a caller with a valid token has the role in the token's role claim. If that role is unknown,
    the caller has only the role `caller`."""
    async with AdminClient(keyed.gateway.endpoints["admin"], token(issuer, **claims)) as client:
        assert await client.code("Tenants.List", tenants_pb2.ListTenantsRequest()) == code


@pytest.mark.parametrize("what", FORGED)
async def test_forged_on_the_admin_port(keyed: Keyed, key: str, issuer: str, what: str) -> None:
    """The credentials that are refused at the client ports are also refused at the admin port."""
    async with AdminClient(keyed.gateway.endpoints["admin"], FORGED[what](key, issuer)) as client:
        assert await client.code("Tenants.List", tenants_pb2.ListTenantsRequest()) == "UNAUTHENTICATED"
