"""Certificate revocation. A revoked certificate is refused at every port, and open connections with that certificate
are closed within about a second."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from typer.testing import CliRunner

from cluster.admin.v1 import admin_pb2
from cluster.cli.all_commands import app
from cluster.config.gateway import LinkTls
from cluster.gateway.auth.revocation import RevokedFile
from cluster.gateway.auth.tls import NewestContext
from cluster.v1 import inference_pb2 as pb
from cluster.v1 import inference_pb2_grpc as pb_grpc
from cluster.wire.bundle import Bundle
from cluster.wire.tls import TlsFiles
from tests.support.admin import AdminClient
from tests.support.calls import chat
from tests.support.certificates import Authority
from tests.support.cluster import sim_engine, until
from tests.support.http import chat_body
from tests.support.keyed import Keyed, bearer, keyed_cluster

pytestmark = pytest.mark.slow

SOON_S = 60.0
"""Longest wait in seconds for an effect that takes about a second, with time to spare for a busy host."""


def headrace(*arguments: str | Path) -> str:
    """Run a command that must succeed, and return its output."""
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


class World:
    """A gateway with TLS and revocation lists on all ports. The callers `ada` and `bob` are operators."""

    def __init__(self, keyed: Keyed, folder: Path, authority: Authority) -> None:
        self.keyed = keyed
        self.authority = authority
        self.callers = {name: authority.issue(f"{name}.example.com") for name in ("ada", "bob")}
        self.workers = {name: authority.issue(name) for name in ("one", "two")}
        self.clients, self.links = folder / "clients", folder / "links"

    def address(self, listener: str) -> str:
        """Return the address of a listener, with the host name that is in the certificate."""
        return f"localhost:{self.keyed.gateway.endpoints[listener].rsplit(':', 1)[1]}"

    @staticmethod
    def shown(files: TlsFiles) -> grpc.ChannelCredentials:
        """Return the channel credentials of a caller."""
        return files.channel_credentials()

    def channel(self, files: TlsFiles) -> grpc.aio.Channel:
        """Return a channel with a separate connection to the client port."""
        options = (("grpc.use_local_subchannel_pool", 1),)
        return grpc.aio.secure_channel(self.address("grpc"), self.shown(files), options=options)

    def http(self, files: TlsFiles) -> httpx.AsyncClient:
        """Return a separate HTTP client."""
        context = ssl.create_default_context(cafile=str(files.ca_file))
        context.load_cert_chain(files.cert_file, files.key_file)
        return httpx.AsyncClient(base_url=f"https://{self.address('http')}", verify=context, timeout=60)

    def admin(self, files: TlsFiles) -> AdminClient:
        """Return a separate client for the admin port."""
        return AdminClient(self.address("admin"), tls=self.shown(files))

    async def let_in(self, files: TlsFiles) -> set[str]:
        """Return the names of the ports that accept a new connection with this certificate."""
        found = set()
        async with self.channel(files) as channel:
            try:
                await pb_grpc.InferenceStub(channel).ListModels(pb.ListModelsRequest(), timeout=60)
                found.add("grpc")
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
        async with self.http(files) as http:
            try:
                assert (await http.get("/v1/models")).status_code == 200
                found.add("http")
            except httpx.TransportError:
                pass
        async with self.admin(files) as admin:
            try:
                await admin.ask("Fleet.ListWorkers", admin_pb2.ListWorkersRequest(), 10)
                found.add("admin")
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
        return found


@asynccontextmanager
async def world_in(folder: Path) -> AsyncIterator[World]:
    """Run the gateway of a World, without workers."""
    authority = Authority(folder / "authority")
    ours = authority.issue("gateway.example.com")
    for name in ("clients", "links"):
        (folder / name).write_text("# none yet\n")
    files = f"cert_file: {ours.cert_file}, key_file: {ours.key_file}"
    tls = (
        f"  tls: {{{files}, client_ca_file: {ours.ca_file}, revoked_serials_file: {folder / 'clients'}}}\n"
        f"  link_tls: {{{files}, ca_file: {ours.ca_file}, revoked_serials_file: {folder / 'links'}}}\n"
    )
    rules = ", ".join(f"{{san: {name}.example.com, tenant: billing, role: operator}}" for name in ("ada", "bob"))
    auth = (
        f"auth: {{cluster_secret_file: {folder / 'secret'}, api_keys: {{pepper_file: {folder / 'pepper'}}}, "
        f"client_certificates: [{rules}]}}\n"
        "tenants: [{name: billing, models: [sim]}]\n"
    )
    async with keyed_cluster(folder, auth, tls) as keyed:
        world = World(keyed, folder, authority)
        await keyed.cluster.channel.close()
        keyed.cluster.channel = world.channel(world.callers["bob"])
        keyed.cluster.stub = pb_grpc.InferenceStub(keyed.cluster.channel)
        yield world
        await keyed.cluster.until_idle()


async def test_a_revoked_caller_is_ended_and_refused(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A caller whose certificate is revoked can no longer make calls or use the admin port. Other callers continue."""
    async with world_in(tmp_path) as world:
        engine = sim_engine(checkpoint, decode_ms=20)
        await world.keyed.cluster.add_worker(engine, bundle, tls=world.workers["one"])
        ada, bob = world.callers["ada"], world.callers["bob"]
        assert await world.let_in(ada) == {"grpc", "http", "admin"}
        async with world.channel(ada) as channel, world.channel(bob) as other, world.http(ada) as http:
            stream = pb_grpc.InferenceStub(channel).StreamChat(chat(max_tokens=2000))
            session = pb_grpc.InferenceStub(channel).Session()
            await session.write(pb.SessionRequest(start=pb.SessionStart(call_id=1, chat=chat(max_tokens=2000))))
            kept = pb_grpc.InferenceStub(other).StreamChat(chat(max_tokens=2000))
            asked = asyncio.create_task(http.post("/v1/chat/completions", json=chat_body(max_tokens=2000)))
            for call in (stream, session, kept):
                await call.read()
            headrace("certs", "revoke", world.clients, ada.cert_file, "--note", "stolen")
            async with asyncio.timeout(SOON_S):
                assert await stream.code() is grpc.StatusCode.UNAVAILABLE
                assert await session.code() is grpc.StatusCode.UNAVAILABLE
                with pytest.raises(httpx.TransportError):
                    await asked
            assert await world.let_in(ada) == set()
            assert await kept.read() is not grpc.aio.EOF
            kept.cancel()
        assert await world.let_in(bob) == {"grpc", "http", "admin"}
        key = await world.keyed.key("keyed")
        assert (await world.keyed.cluster.stub.Chat(chat(max_tokens=2), metadata=bearer(key))).choices


async def test_a_revoked_worker_is_ended_and_refused(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A worker whose certificate is revoked no longer serves. Its calls continue on another worker."""
    async with world_in(tmp_path) as world:
        cluster = world.keyed.cluster
        one, two = [
            await cluster.add_worker(sim_engine(checkpoint, decode_ms=5), bundle, tls=world.workers[name])
            for name in ("one", "two")
        ]
        serial = headrace("certs", "list", await asyncio.to_thread(_revoked_by_serial, world))
        assert "CN=" not in serial, "a serial by itself counts for any issuer"
        await until(lambda: not cluster.linked(one.identity.worker_id), "its link has ended", SOON_S)
        assert (await cluster.stub.Chat(chat(max_tokens=2))).choices
        assert cluster.linked(two.identity.worker_id)
        await until(lambda: not one.end.statistics().links, "the worker knows it", SOON_S)
        world.links.write_text("")
        await until(lambda: cluster.linked(one.identity.worker_id), "it dials anew when it is revoked no longer")


def _revoked_by_serial(world: World) -> Path:
    """Revoke the first worker's certificate by its serial number in openssl's notation, and return the path of the
    revocation list."""
    from cryptography import x509

    certificate = x509.load_pem_x509_certificate(world.workers["one"].cert_file.read_bytes())
    headrace("certs", "revoke", world.links, f"serial={certificate.serial_number:040X}")
    return world.links


def test_a_list_that_breaks_leaves_the_last_one_in_force(tmp_path: Path) -> None:
    """While the revocation list is invalid or missing, revoked certificates stay revoked."""
    path = tmp_path / "revoked"
    path.write_text("0A\n")
    file = RevokedFile(path, "gateway.tls.revoked_serials_file")
    good = file.current()
    path.write_text("not a serial\n")
    assert file.current() is good
    path.unlink()
    assert file.current() is good
    path.write_text("0A\n0B\n")
    assert file.current().has(0x0B, "CN=any")


@pytest.mark.parametrize("text", [None, "zz\n"])
def test_a_list_that_cannot_be_read_ends_the_start(tmp_path: Path, text: str | None) -> None:
    """A gateway with an invalid revocation list does not start, and the error message names the setting and the
    file."""
    files = Authority(tmp_path / "a").issue("x")
    path = tmp_path / "revoked"
    if text is not None:
        path.write_text(text)
    tls = LinkTls(cert_file=files.cert_file, key_file=files.key_file, ca_file=files.ca_file, revoked_serials_file=path)
    with pytest.raises(ValueError, match=r"gateway.link_tls.revoked_serials_file: .*revoked"):
        NewestContext.of_link(tls)


def test_an_authority_lists_what_it_issued(tmp_path: Path) -> None:
    """If the file of a certificate is lost, the certificate can be revoked by its serial number, which is in the list
    of issued certificates. The revocation list gets the same line as for a revocation by file."""
    headrace("certs", "ca", tmp_path)
    headrace("certs", "worker", tmp_path, "--model", "m")
    headrace("certs", "worker", tmp_path, "--controller", "--name", "controller")
    shown = headrace("certs", "list", tmp_path / "issued")
    assert "controller, valid until" in shown
    serial = shown.splitlines()[1].split()[0]
    headrace("certs", "revoke", tmp_path / "revoked", serial, "--issuer", "CN=headrace link authority")
    before = (tmp_path / "revoked").read_text()
    headrace("certs", "revoke", tmp_path / "revoked", tmp_path / "worker.crt")
    assert (tmp_path / "revoked").read_text() == before, "it is there already"
    wrong = CliRunner().invoke(app, ["certs", "revoke", str(tmp_path / "revoked"), "worker"])
    assert (wrong.exit_code, (tmp_path / "revoked").read_text()) == (2, before)
