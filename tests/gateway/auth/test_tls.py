"""TLS of the client ports: API keys over TLS, client certificates in place of keys, and renewal of certificates while
the gateway runs."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from cluster.client import AsyncClient
from cluster.config.gateway import ClientTls
from cluster.gateway.auth.tls import NewestContext
from cluster.v1 import inference_pb2 as pb
from cluster.v1 import inference_pb2_grpc as pb_grpc
from cluster.wire.bundle import Bundle
from cluster.wire.tls import TlsFiles
from tests.support.calls import chat, refused
from tests.support.certificates import Authority
from tests.support.cluster import sim_engine
from tests.support.http import chat_body
from tests.support.keyed import Keyed, bearer, keyed_cluster, session_end

pytestmark = pytest.mark.slow


class World:
    """A gateway with TLS, the certificate authority of the gateway, and the certificate authority of the callers."""

    def __init__(self, keyed: Keyed, authority: Authority, files: TlsFiles, callers: Authority) -> None:
        self.keyed = keyed
        self.authority = authority
        self.files = files
        self.callers = callers

    def address(self, listener: str) -> str:
        """Return the address of a listener, with the host name that is in the certificate."""
        return f"localhost:{self.keyed.gateway.endpoints[listener].rsplit(':', 1)[1]}"

    def channel(self, shown: TlsFiles | None = None) -> grpc.aio.Channel:
        """Return a channel with a separate gRPC connection. `shown`: the client certificate to present, if any."""
        roots = self.files.ca_file.read_bytes()
        own = (None, None) if shown is None else (shown.key_file.read_bytes(), shown.cert_file.read_bytes())
        options = (("grpc.use_local_subchannel_pool", 1),)
        return grpc.aio.secure_channel(self.address("grpc"), grpc.ssl_channel_credentials(roots, *own), options=options)

    def http(self, shown: TlsFiles | None = None) -> httpx.AsyncClient:
        """Return a new HTTP client. `shown`: the client certificate to present, if any."""
        context = ssl.create_default_context(cafile=str(self.files.ca_file))
        if shown is not None:
            context.load_cert_chain(shown.cert_file, shown.key_file)
        return httpx.AsyncClient(base_url=f"https://{self.address('http')}", verify=context)

    async def certificate(self, listener: str) -> bytes:
        """Return the server certificate that a new connection gets."""
        context = ssl.create_default_context(cafile=str(self.files.ca_file))
        host, port = self.address(listener).split(":")
        _, writer = await asyncio.open_connection(host, int(port), ssl=context)
        found: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        return found


@pytest.fixture(scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, bundle: Bundle) -> AsyncIterator[World]:
    """Provide a gateway at which certificates for `billing.example.com` belong to the tenant billing."""
    folder = tmp_path_factory.mktemp("tls")
    authority, callers = Authority(folder / "ours"), Authority(folder / "theirs")
    files, caller = authority.issue("gateway.example.com"), callers.issue("somebody")
    tls = f"  tls: {{cert_file: {files.cert_file}, key_file: {files.key_file}, client_ca_file: {caller.ca_file}}}\n"
    auth = (
        f"auth: {{cluster_secret_file: {folder / 'secret'}, api_keys: {{pepper_file: {folder / 'pepper'}}}, "
        "client_certificates: [{san: billing.example.com, tenant: billing}]}\n"
        "tenants: [{name: billing, models: [sim]}]\n"
    )
    async with keyed_cluster(folder, auth, tls) as keyed:
        await keyed.cluster.channel.close()
        keyed.cluster.channel = World(keyed, authority, files, callers).channel()
        keyed.cluster.stub = pb_grpc.InferenceStub(keyed.cluster.channel)
        await keyed.cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
        yield World(keyed, authority, files, callers)
        await keyed.cluster.until_idle()


async def test_keys_over_tls(world: World) -> None:
    """API keys work over TLS with both APIs and the SDK, and connections in plain text are refused."""
    key = await world.keyed.key("tls-key")
    async with AsyncClient(world.address("grpc"), api_key=key, tls_ca_file=world.files.ca_file) as client:
        assert (await client.chat("sim", "Hello", max_tokens=4)).text
    async with world.http() as http:
        reply = await http.post("/v1/chat/completions", json=chat_body(), headers={"authorization": f"Bearer {key}"})
        assert reply.status_code == 200
        stream = await http.post(
            "/v1/chat/completions", json=chat_body(stream=True), headers={"authorization": f"Bearer {key}"}
        )
        assert stream.text.endswith("data: [DONE]\n\n")
    async with grpc.aio.insecure_channel(world.address("grpc")) as plain:
        answer = await refused(pb_grpc.InferenceStub(plain).Chat(chat(), metadata=bearer(key), timeout=5))
        assert answer.code.name in ("UNAVAILABLE", "DEADLINE_EXCEEDED")


async def test_a_certificate_in_place_of_a_key(world: World) -> None:
    """A client certificate authenticates calls in both APIs and in sessions. A certificate with an unknown name is
    refused, and so is a bad key with a good certificate."""
    billing, other = world.callers.issue("billing.example.com"), world.callers.issue("other.example.com")
    async with world.channel(billing) as channel:
        stub = pb_grpc.InferenceStub(channel)
        assert (await stub.Chat(chat())).choices
        session = stub.Session()
        await session.write(pb.SessionRequest(start=pb.SessionStart(call_id=1, chat=chat())))
        assert await session_end(session, 1) == ""
        await session.done_writing()
        assert (await refused(stub.Chat(chat(), metadata=bearer("hr_k_wrong")))).reason == "UNAUTHENTICATED_KEY"
    async with world.channel(other) as channel:
        assert (await refused(pb_grpc.InferenceStub(channel).Chat(chat()))).reason == "UNAUTHENTICATED_KEY"
    for shown, status in ((billing, 200), (other, 401), (None, 401)):
        async with world.http(shown) as http:
            assert (await http.get("/v1/models")).status_code == status
    async with world.http(billing) as http:
        assert (await http.get("/v1/models", headers={"authorization": "Bearer x"})).status_code == 401


async def test_a_strangers_certificate_ends_the_handshake(world: World, tmp_path: Path) -> None:
    """A handshake with a certificate from another authority fails, whatever name is in the certificate."""
    forged = Authority(tmp_path / "forged").issue("billing.example.com")
    async with world.channel(forged) as channel:
        answer = await refused(pb_grpc.InferenceStub(channel).Chat(chat(), timeout=60))
        assert answer.code.name in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
    async with world.http(forged) as http:
        with pytest.raises(httpx.TransportError):
            await http.get("/v1/models")


async def test_renewed_certificates_serve_new_connections(world: World) -> None:
    """Both client ports use a renewed certificate without a restart. Open connections continue, and a half-written
    renewal has no effect."""
    key = await world.keyed.key("renews")
    old = [await world.certificate(listener) for listener in ("grpc", "http")]
    assert old[0] == old[1]
    async with world.channel() as before:
        stub = pb_grpc.InferenceStub(before)
        assert (await stub.Chat(chat(), metadata=bearer(key))).choices
        key_file = world.files.key_file.read_bytes()
        renewed = world.authority.issue("gateway.example.com")  # over the same files
        new_key = renewed.key_file.read_bytes()
        renewed.key_file.write_bytes(key_file)
        assert [await world.certificate(listener) for listener in ("grpc", "http")] == old
        renewed.key_file.write_bytes(new_key)
        found = [await world.certificate(listener) for listener in ("grpc", "http")]
        assert found[0] == found[1] != old[0]
        assert (await stub.Chat(chat(), metadata=bearer(key))).choices
    async with world.channel() as after:
        assert (await pb_grpc.InferenceStub(after).Chat(chat(), metadata=bearer(key))).choices


@pytest.mark.parametrize(
    ("broken", "words"),
    [("cert_file", "cannot be used"), ("key_file", "cannot be used"), ("client_ca_file", "client_ca_file")],
)
def test_wrong_files_are_named(tmp_path: Path, broken: str, words: str) -> None:
    """A gateway with a missing or damaged certificate file does not start, and the error message names the file."""
    files = Authority(tmp_path / "a").issue("x")
    given: dict[str, Any] = {"cert_file": files.cert_file, "key_file": files.key_file, "client_ca_file": files.ca_file}
    for contents in ("rubbish", None):
        path = tmp_path / broken
        path.unlink(missing_ok=True)
        if contents is not None:
            path.write_text(contents)
        with pytest.raises(ValueError, match=words):
            NewestContext.of(ClientTls(**{**given, broken: path}), "h2")
