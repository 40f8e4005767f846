"""Peers that connect to the link port of a running gateway with a wrong certificate, or act in a role that their
certificate does not grant. The certificates come from `headrace certs`."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from cluster.api.types import CatalogEntry, WorkerIdentity
from cluster.cli.all_commands import app
from cluster.config.gateway import Tls
from cluster.controller.links import ControllerLinks
from cluster.gateway.auth.tls import NewestContext
from cluster.gateway.links.hub import Hub, hub_server
from cluster.gateway.links.peer_identity import MOST_REMEMBERED, PeerIdentity
from cluster.link.v1 import link_pb2 as pb
from cluster.link.v1 import link_pb2_grpc as pb_grpc
from cluster.wire.bundle import Bundle
from cluster.wire.codecs import codec
from cluster.wire.dial import Timing, read
from cluster.wire.tls import TlsFiles
from tests.support.calls import chat
from tests.support.certificates import Authority
from tests.support.cluster import LOOPBACK, TestCluster, Worker, running_cluster, sim_engine, until
from tests.support.serving import Door

pytestmark = pytest.mark.slow

CODE = grpc.StatusCode
QUICK = Timing(welcome_s=0.5, redial_max_s=0.2, silence_s=60.0, hang_s=60.0)
TRIES = 5
"""Number of tries of a message. On a busy machine a large one may be on its way for longer than `welcome_s`."""


def certs(*arguments: str) -> None:
    """Run a command of `headrace certs`, which must succeed."""
    done = CliRunner().invoke(app, ["certs", *arguments])
    assert done.exit_code == 0, done.output


def make_files(folder: Path) -> None:
    """Make an authority, a gateway's certificate, and the certificates of three peers."""
    certs("ca", str(folder))
    certs("gateway", str(folder), "--host", "127.0.0.1", "--host", "localhost")
    certs("worker", str(folder), "--model", "sim")
    certs("worker", str(folder), "--model", "other", "--name", "other")
    certs("worker", str(folder), "--controller", "--name", "controller")


@dataclass
class Secured:
    """A gateway with link_tls and one linked worker."""

    cluster: TestCluster
    folder: Path
    worker: Worker

    @property
    def address(self) -> str:
        """Address of the link port."""
        return self.cluster.gateway.endpoints["link"]

    def files(self, name: str) -> TlsFiles:
        """Return the files of a certificate from the cluster's authority."""
        return TlsFiles(self.folder / f"{name}.crt", self.folder / f"{name}.key", self.folder / "ca.crt")

    def hello(self, **fields: Any) -> pb.Hello:
        """Return the Hello of a fictitious worker of the model `sim`."""
        told = {"worker_id": "rogue", "incarnation": "x", "model": "sim", "epoch": 1, **fields}
        return pb.Hello(protocol_min=1, protocol_max=1, **told)

    async def says(self, credentials: grpc.ChannelCredentials | None, method: str, message: Any) -> CODE:
        """Open a stream, send one message, and return the status code of the stream. Asserts that the gateway sends no
        message."""
        options = (("grpc.use_local_subchannel_pool", 1),)
        channel = (
            grpc.aio.insecure_channel(self.address, options=options)
            if credentials is None
            else grpc.aio.secure_channel(self.address, credentials, options=options)
        )
        async with channel:
            call = getattr(pb_grpc.LinkStub(channel), method)(timeout=5)
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await call.write(message)
            with contextlib.suppress(grpc.aio.AioRpcError):
                assert await read(call) is None, "a stranger was told something"
            code: CODE = await call.code()
            return code

    async def as_holder(self, name: str, method: str, message: Any) -> CODE:
        """Open a stream with the certificate `name`, which the cluster's authority has issued, and send one message.
        Return the status code of the stream."""
        return await self.says(self.files(name).channel_credentials(), method, message)

    async def undisturbed(self) -> None:
        """Assert that the worker still has its link, that there is no other link, and that calls are served."""
        (link,) = self.cluster.gateway.hub.links
        assert (link.identity, link.epoch) == (self.worker.identity, 1)
        assert self.cluster.gateway.hub.statistics().controllers == 0
        assert (await self.cluster.stub.Chat(chat(max_tokens=2))).choices


@pytest.fixture(scope="module")
async def secured(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, bundle: Bundle) -> AsyncIterator[Secured]:
    """Provide one gateway with TLS and a worker, for all tests of this module. The tests act with wrong certificates,
    and must not affect this worker."""
    folder = tmp_path_factory.mktemp("certs")
    make_files(folder)
    async with running_cluster(folder / "state", config(folder), QUICK) as cluster:
        files = TlsFiles(folder / "worker.crt", folder / "worker.key", folder / "ca.crt")
        worker = await cluster.add_worker(sim_engine(checkpoint), bundle, tls=files)
        yield Secured(cluster, folder, worker)


def config(folder: Path) -> str:
    """Return the configuration of a gateway whose link port uses the certificate in the folder."""
    files = f"{{cert_file: {folder}/gateway.crt, key_file: {folder}/gateway.key, ca_file: {folder}/ca.crt}}"
    return LOOPBACK.replace("drain_timeout_s: 0", f"drain_timeout_s: 0\n  link_tls: {files}")


async def test_without_a_certificate_of_ours(secured: Secured, tmp_path: Path) -> None:
    """A peer gets no stream over plain text, without a certificate, with a certificate from another authority, or with
    the gateway's own server certificate."""
    roots = secured.files("worker").ca_file.read_bytes()
    forged = Authority(tmp_path / "forged").issue("worker")
    shown = grpc.ssl_channel_credentials(roots, forged.key_file.read_bytes(), forged.cert_file.read_bytes())
    attempts = [None, grpc.ssl_channel_credentials(roots), shown, secured.files("gateway").channel_credentials()]
    for credentials in attempts:
        assert await secured.says(credentials, "Turn", pb.WorkerTurn(hello=secured.hello())) is CODE.UNAVAILABLE
    await secured.undisturbed()


async def test_a_certificate_for_something_else(secured: Secured) -> None:
    """A worker of one model cannot act as a worker of another model: it cannot replace the other worker's link, read
    its prompts or send its beats. A worker cannot act as the controller, and the controller cannot act as a worker."""
    mine = secured.worker.identity
    place: dict[str, Any] = {"worker_id": mine.worker_id, "incarnation": mine.incarnation, "epoch": 1}
    attempts: list[tuple[str, str, Any]] = [
        ("other", "Turn", pb.WorkerTurn(hello=secured.hello())),
        ("other", "Turn", pb.WorkerTurn(hello=secured.hello(model="other", worker_id=mine.worker_id))),
        ("other", "Turn", pb.WorkerTurn(hello=secured.hello(model="*"))),
        ("other", "Bulk", pb.Blob(**place)),
        ("other", "Bulk", pb.Blob(worker_id="controller:x")),
        ("other", "Beat", pb.WorkerBeat(**place)),
        ("worker", "Control", pb.ControllerFrame(hello=pb.ControllerHello(controller_id="rogue"))),
        ("controller", "Turn", pb.WorkerTurn(hello=secured.hello())),
    ]
    for holder, method, message in attempts:
        assert await secured.as_holder(holder, method, message) is CODE.PERMISSION_DENIED, (holder, method, message)
    for holder, code in (
        ("worker", CODE.PERMISSION_DENIED),
        ("other", CODE.PERMISSION_DENIED),
        ("controller", CODE.OK),
    ):
        async with grpc.aio.secure_channel(secured.address, secured.files(holder).channel_credentials()) as channel:
            assert await pb_grpc.LinkStub(channel).ReadOperatorState(pb.ReadOperatorStateRequest()).code() is code
    await secured.undisturbed()


async def test_a_hello_is_taken_once(secured: Secured) -> None:
    """A replayed Hello is refused and does not end the existing link, even if the replayed Hello is an exact copy and
    is sent with the right certificate."""
    hello = codec.hello_to_pb(secured.worker.identity, secured.worker.info, 1)
    assert await secured.as_holder("worker", "Turn", pb.WorkerTurn(hello=hello)) is CODE.FAILED_PRECONDITION
    await secured.undisturbed()


async def test_a_stranger_bars_no_worker(secured: Secured) -> None:
    """A worker of another model that sends a worker's id or incarnation with the highest epoch is served as itself or
    refused, and the worker is accepted again with its next epoch."""
    mine, everything = secured.worker.identity, (1 << 64) - 1
    async with grpc.aio.secure_channel(secured.address, secured.files("other").channel_credentials()) as channel:
        taken = secured.hello(model="other", incarnation=mine.incarnation, epoch=everything)
        call: Any = pb_grpc.LinkStub(channel).Turn(timeout=60)
        await call.write(pb.WorkerTurn(hello=taken))
        assert (await read(call)).HasField("welcome")
        same_id = secured.hello(model="other", worker_id=mine.worker_id, epoch=everything)
        assert await secured.as_holder("other", "Turn", pb.WorkerTurn(hello=same_id)) is CODE.PERMISSION_DENIED
        call.cancel()
    identity = secured.cluster.gateway.hub._peer_identity
    assert not identity.is_replayed(mine, 2)
    identity._epochs[mine.model][mine.worker_id, mine.incarnation] = 1
    await until(lambda: len(secured.cluster.gateway.hub.links) == 1, "the stranger has left")
    await secured.undisturbed()


@pytest.mark.parametrize(
    "fields",
    [
        {"default_sampling_json": '{"a": "' + "x" * (5 << 20) + '"}'},
        {"default_sampling_json": "[" * 60_000},
        {"default_sampling_json": '{"a": ' + "[" * 99 + "]" * 99 + "}", "model": "x" * 300},
        {"incarnation": "i" * 256},
        {"capabilities": ["c"] * 65},
    ],
    ids=["long", "deep", "model", "incarnation", "capabilities"],
)
async def test_a_hello_beyond_the_bounds(secured: Secured, fields: dict[str, Any]) -> None:
    """A Hello with a text, a list or nesting beyond its bound is refused."""
    hello = pb.WorkerTurn(hello=secured.hello(**fields))
    assert await secured.as_holder("worker", "Turn", hello) in (CODE.INVALID_ARGUMENT, CODE.INTERNAL)
    await secured.undisturbed()


@pytest.mark.parametrize("method", ["Turn", "Bulk", "Beat", "Control"])
async def test_garbage_in_place_of_messages(secured: Secured, method: str) -> None:
    """A stream ends after an invalid message, after an oversized message, and after silence."""
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1))
    credentials = secured.files("worker").channel_credentials()
    async with grpc.aio.secure_channel(secured.address, credentials, options=options) as channel:
        stream: Any = channel.stream_stream(f"/cluster.link.v1.Link/{method}")
        for data, code in ((b"\xff" * 50, CODE.INTERNAL), (b"\x0a" * (65 << 20), CODE.RESOURCE_EXHAUSTED)):
            for _ in range(TRIES):
                call = stream(timeout=60)
                with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    await call.write(data)
                if await call.code() is code:
                    break
            assert await call.code() is code
        if method != "Beat":  # silence on a Beat stream keeps no worker alive
            assert await stream(timeout=60).code() is CODE.INVALID_ARGUMENT
    await secured.undisturbed()


async def test_noise_within_tls(secured: Secured) -> None:
    """A connection with a valid certificate ends when it carries bytes that are not HTTP/2."""
    files = secured.files("worker")
    context = ssl.create_default_context(cafile=str(files.ca_file))
    context.load_cert_chain(files.cert_file, files.key_file)
    host, port = secured.address.split(":")
    for noise in (b"\x00" * 4096, b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 64):
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname="localhost")
        writer.write(noise)
        await asyncio.wait_for(reader.read(1 << 20), 60)
        writer.close()
    await secured.undisturbed()


async def test_other_weights_than_pinned(secured: Secured, bundle: Bundle) -> None:
    """Once the catalog pins a model's weights, a worker with other weights is refused, and a worker with the pinned
    weights is accepted. The catalog is accepted from any peer with the controller's certificate."""
    end = ControllerLinks(
        controller_id="c", gateways=[secured.address], tls=secured.files("controller"), bundles=lambda _: None
    )
    task = asyncio.create_task(end.run())
    entry = CatalogEntry("sim", weight_digests=("sha256:right",), weights_pinned=True, bundle_digest=bundle.digest)
    end.publish([entry])
    await until(lambda: secured.cluster.gateway.directory.models[0].in_catalog, "the catalog has come")
    wrong = pb.WorkerTurn(hello=secured.hello(weight_digest="sha256:wrong", incarnation="wrong"))
    assert await secured.as_holder("worker", "Turn", wrong) is CODE.FAILED_PRECONDITION
    directory = secured.cluster.gateway.directory
    assert directory.refusal_of(WorkerIdentity("w", "i", "sim", weight_digest="sha256:right")) == ""
    assert directory.refusal_of(WorkerIdentity("w", "i", "unheard")) == ""
    end.publish([CatalogEntry("sim", bundle_digest=bundle.digest)])
    await until(lambda: not directory.models[0].entry.weights_pinned, "nothing is pinned any more")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until(lambda: secured.cluster.gateway.hub.statistics().controllers == 0, "the controller has left")
    await secured.undisturbed()


async def test_a_worker_says_nothing_to_who_is_no_gateway(
    secured: Secured, checkpoint: Path, bundle: Bundle, tmp_path: Path
) -> None:
    """A peer that acts as a gateway but has a worker's certificate gets no Hello from workers."""
    files = secured.files("other")
    seen: list[str] = []

    class Nosy(Hub):
        async def Turn(self, request_iterator: object, context: Any) -> None:  # type: ignore[override]
            seen.append(str(await context.read()))

    server = hub_server(Nosy("nosy", Door(), tuple, tuple))
    tls = NewestContext.of_link(Tls(cert_file=files.cert_file, key_file=files.key_file, ca_file=files.ca_file))
    port = await server.start("127.0.0.1", 0, tls)
    worker = await secured.cluster.add_worker(
        sim_engine(checkpoint), bundle, tls=secured.files("worker"), gateways=[f"127.0.0.1:{port}"], wait=False
    )
    host, own = f"127.0.0.1:{port}".split(":")
    _, writer = await asyncio.open_connection(host, int(own))  # it does listen
    writer.close()
    async with grpc.aio.secure_channel(f"{host}:{own}", secured.files("worker").channel_credentials()) as channel:
        call = pb_grpc.LinkStub(channel).Turn(timeout=1)
        assert await call.code() is CODE.UNAVAILABLE
    assert not seen
    assert worker.end.statistics().links == 0
    await worker.stop()
    await server.stop(0)


@pytest.mark.slow
async def test_both_sides_take_renewed_certificates(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """All certificate files can be replaced by files of another authority without a restart. The open link continues,
    and the next link uses the new files. A missing key only delays the next link."""
    make_files(tmp_path / "old")
    make_files(tmp_path / "new")
    used = tmp_path / "used"
    used.mkdir()

    def put(generation: str) -> None:
        for file in (tmp_path / generation).iterdir():
            (used / file.name).write_bytes(file.read_bytes())

    put("old")
    async with running_cluster(tmp_path / "state", config(used)) as cluster:
        files = TlsFiles(used / "worker.crt", used / "worker.key", used / "ca.crt")
        worker = await cluster.add_worker(sim_engine(checkpoint), bundle, tls=files, timing=QUICK)
        (first,) = cluster.gateway.hub.links
        assert (await cluster.stub.Chat(chat(max_tokens=2))).choices, "all its connections are up"
        put("new")
        (used / "worker.key").unlink()
        assert (await cluster.stub.Chat(chat(max_tokens=2))).choices
        first.close("cut by the test")
        await until(lambda: worker.end.statistics().links == 0, "the link has ended")
        put("new")
        await until(lambda: cluster.linked(worker.identity.worker_id), "it has dialed anew")
        assert (await cluster.stub.Chat(chat(max_tokens=2))).choices
        assert not worker.task.done()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("gateway", "{}", "--host", "x"), "make one: `headrace certs ca"),
        (("worker", "{}"), "--model"),
        (("worker", "{}", "--model", "m", "--name", "ca"), "other than the authority's"),
        (("worker", "{}", "--model", "m", "--name", "../x"), "other than the authority's"),
    ],
)
def test_what_cannot_be_issued_is_refused(tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    """A `certs` command with wrong arguments exits with code 2, names the remedy, and writes no file."""
    done = CliRunner().invoke(app, ["certs", *(one.format(tmp_path) for one in arguments)])
    assert done.exit_code == 2
    assert says in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_authority_is_made_once_and_its_keys_are_private(tmp_path: Path) -> None:
    """A second `certs ca` does not overwrite the authority's key, and only the owner can read key files."""
    make_files(tmp_path)
    before = (tmp_path / "ca.key").read_bytes()
    assert CliRunner().invoke(app, ["certs", "ca", str(tmp_path)]).exit_code == 2
    assert (tmp_path / "ca.key").read_bytes() == before
    assert {file.stat().st_mode & 0o077 for file in tmp_path.glob("*.key")} == {0}


def test_old_incarnations_are_forgotten() -> None:
    """The gateway remembers the Hello messages of workers, so that it can refuse a repeated one. It remembers a limited
    number: the newest messages."""
    admission = PeerIdentity(by_certificate=False)
    identity: Callable[[int], WorkerIdentity] = lambda i: WorkerIdentity("w", str(i), "m")  # noqa: E731
    for number in range(MOST_REMEMBERED + 10):
        assert not admission.is_replayed(identity(number), 1)
    assert admission.is_replayed(identity(MOST_REMEMBERED), 1)
    assert not admission.is_replayed(identity(MOST_REMEMBERED), 2)
    assert not admission.is_replayed(identity(0), 1), "forgotten"
