"""The lifetime of links: the order of starts, restarts, reconnects, silent peers, several gateways, and TLS."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from cluster.api.ports import EngineDead
from cluster.api.types import CatalogEntry, ModelState, WorkerIdentity
from cluster.controller.links import ControllerLinks
from cluster.link.v1 import link_pb2 as pb
from cluster.link.v1 import link_pb2_grpc as pb_grpc
from cluster.wire.bundle import Bundle
from cluster.wire.dial import Timing, read
from cluster.wire.tls import TlsFiles
from cluster.worker.session import WorkerSession
from tests.support.calls import chat, refused
from tests.support.certificates import Authority
from tests.support.cluster import LOOPBACK, TestCluster, running_cluster, sim_engine, until

pytestmark = pytest.mark.slow


@pytest.mark.slow
async def test_worker_survives_a_gateways_restart(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A worker may start before the gateway, and reconnects to a gateway that was restarted on the same port."""
    engine = sim_engine(checkpoint, decode_ms=1)
    info = await engine.start()
    async with running_cluster(tmp_path / "probe") as probe:
        address = probe.gateway.endpoints["link"]
    config = LOOPBACK.replace('link: "127.0.0.1:0"', f'link: "{address}"')
    end = WorkerSession(
        identity=WorkerIdentity("w", "i", "sim", bundle_digest=bundle.digest),
        engine=engine,
        info=info,
        bundle=bundle,
        gateways=[address],
    )
    task = asyncio.create_task(end.run())  # the gateway is not listening yet
    for generation in range(2):
        async with running_cluster(tmp_path / str(generation), config) as cluster:
            await until(lambda c=cluster: c.linked("w"), "the worker has dialed in")  # type: ignore[misc]
            answer = await cluster.stub.Chat(chat(max_tokens=6, ignore_eos=True))
            assert answer.usage.completion_tokens == 6
            cut = cluster.stub.StreamChat(chat(max_tokens=1500, ignore_eos=True))
            await cut.read()
        await until(lambda: end.statistics().running == 0, "requests of the lost gateway are aborted")
    await end.close()
    await task


async def test_two_gateways_share_one_worker(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """Two gateways together never send more requests than a worker's capacity."""
    engine = sim_engine(checkpoint, decode_ms=2, max_num_seqs=6)
    info = await engine.start()
    async with running_cluster(tmp_path / "a") as a, running_cluster(tmp_path / "b") as b:
        end = WorkerSession(
            identity=WorkerIdentity("w", "i", "sim", bundle_digest=bundle.digest),
            engine=engine,
            info=info,
            bundle=bundle,
            gateways=[a.gateway.endpoints["link"], b.gateway.endpoints["link"]],
        )
        task = asyncio.create_task(end.run())
        await until(lambda: a.linked("w") and b.linked("w"), "both gateways have capacity")
        calls = [
            asyncio.ensure_future(c.stub.Chat(chat(f"{i}", max_tokens=20, ignore_eos=True)))
            for i in range(20)
            for c in (a, b)
        ]
        most = 0
        while not all(call.done() for call in calls):
            most = max(most, end.statistics().running)
            await asyncio.sleep(0.001)
        assert most <= 6 + 2
        assert all(call.result().usage.completion_tokens == 20 for call in calls)
        await end.close()
        await task


async def test_dialing_anew_ends_the_older_epoch(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """When a worker reconnects, the new link replaces the worker's older link, and the older link is closed."""
    async with grpc.aio.insecure_channel(cluster.gateway.endpoints["link"]) as channel:
        stub = pb_grpc.LinkStub(channel)
        hello = pb.Hello(protocol_min=1, protocol_max=1, worker_id="w", incarnation="i", model="sim", epoch=1)
        older = stub.Turn()
        await older.write(pb.WorkerTurn(hello=hello))
        assert (await read(older)).HasField("welcome")
        hello.epoch = 2
        newer = stub.Turn()
        await newer.write(pb.WorkerTurn(hello=hello))
        assert (await read(newer)).HasField("welcome")
        assert await older.code() is grpc.StatusCode.UNAVAILABLE
        assert [link.epoch for link in cluster.gateway.hub.links] == [2]
        newer.cancel()


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (pb.WorkerTurn(), grpc.StatusCode.INVALID_ARGUMENT),
        (
            pb.WorkerTurn(hello=pb.Hello(protocol_min=7, protocol_max=9, worker_id="w")),
            grpc.StatusCode.FAILED_PRECONDITION,
        ),
        (
            pb.WorkerTurn(hello=pb.Hello(protocol_min=1, protocol_max=1, default_sampling_json="[")),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
    ],
    ids=["no-hello", "other-protocol", "bad-defaults"],
)
async def test_strangers_are_turned_away(cluster: TestCluster, frame: pb.WorkerTurn, code: grpc.StatusCode) -> None:
    """A peer that sends no valid Hello, or speaks another protocol version, is refused with a status code and leaves no
    link."""
    async with grpc.aio.insecure_channel(cluster.gateway.endpoints["link"]) as channel:
        call = pb_grpc.LinkStub(channel).Turn()
        await call.write(frame)
        assert await call.code() is code
    assert not cluster.gateway.hub.links


@pytest.mark.slow
async def test_silent_worker_is_noticed(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A worker that sends nothing after its Hello is dropped after `silence_s`. A worker with slow engine steps is not
    dropped."""
    timing = Timing(beat_s=0.02, silence_s=0.3)
    async with running_cluster(tmp_path, timing=timing) as cluster:
        async with grpc.aio.insecure_channel(cluster.gateway.endpoints["link"]) as channel:
            call = pb_grpc.LinkStub(channel).Turn()
            hello = pb.Hello(protocol_min=1, protocol_max=1, worker_id="w", model="sim", epoch=1)
            await call.write(pb.WorkerTurn(hello=hello))
            assert (await read(call)).HasField("welcome")
            await until(lambda: not cluster.gateway.hub.links, "the silent link is closed")
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=400), bundle, timing=timing)
        answer = await cluster.stub.Chat(chat(max_tokens=3, ignore_eos=True))
        assert answer.usage.completion_tokens == 3, "slow steps do not stop the beats, which have their own thread"


async def test_links_that_end_leave_no_connection(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """When links end and workers reconnect, no connection is left open, even without garbage collection."""
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
    port = int(cluster.gateway.endpoints["link"].rsplit(":", 1)[1])

    def connections() -> int:
        sockets = psutil.Process().net_connections("tcp4")
        return sum(s.status == psutil.CONN_ESTABLISHED and bool(s.laddr) and s.laddr.port == port for s in sockets)

    gc.disable()
    try:
        for _ in range(4):
            (link,) = cluster.gateway.hub.links
            link.close("it seems lost", "silent")
            await until(lambda old=link: any(new is not old for new in cluster.gateway.hub.links), "it dials anew")  # type: ignore[misc]
        await until(lambda: connections() <= 3, "only the last session's three connections are left")
    finally:
        gc.enable()


@pytest.mark.alone  # gRPC's core has ended the process here, rarely and silently, after many other tests
async def test_a_worker_that_is_stopped_as_it_is_welcomed_stops(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """A worker that is stopped while it receives a Welcome (the gateway's first message) stops within the time
    limit."""
    engine = sim_engine(checkpoint)
    info = await engine.start()
    for passes in range(40):
        worker = await cluster.add_worker(engine, bundle, info=info, wait=False)
        while not cluster.gateway.hub.links:  # noqa: ASYNC110 - in this very pass of the loop
            await asyncio.sleep(0)
        for _ in range(passes):
            await asyncio.sleep(0)
        async with asyncio.timeout(60):
            await worker.stop()
        await until(lambda: not cluster.gateway.hub.links, "its link is gone")


async def test_a_bundle_is_asked_of_another_when_its_holder_goes(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """If a worker is lost before it has sent a requested tokenizer bundle, the bundle is requested from another worker
    at once, before the fetch times out."""
    async with grpc.aio.insecure_channel(cluster.gateway.endpoints["link"]) as channel:
        call = pb_grpc.LinkStub(channel).Turn()
        await call.write(
            pb.WorkerTurn(
                hello=pb.Hello(
                    protocol_min=1, protocol_max=1, worker_id="a", incarnation="1", epoch=1, model="sim",
                    bundle_digest=bundle.digest,
                )
            )
        )  # fmt: skip
        asked = asyncio.ensure_future(cluster.stub.Chat(chat(max_tokens=3, ignore_eos=True)))
        while not (await asyncio.wait_for(read(call), 60)).HasField("fetch_bundle"):
            pass
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle, wait=False)
        await until(lambda: len(cluster.gateway.hub.links) == 2, "the second worker has dialed in")
        call.cancel()
        answer = await asyncio.wait_for(asked, 60)
        assert answer.usage.completion_tokens == 3


async def test_dead_engine_ends_the_workers_run(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """When an engine dies, the worker closes its links and `run` raises EngineDead."""
    engine = sim_engine(checkpoint, decode_ms=1)
    worker = await cluster.add_worker(engine, bundle)
    run = asyncio.create_task(worker.end.run())
    await until(lambda: worker.end.statistics().links >= 1, "linked")
    engine.faults.kill("test")
    with pytest.raises(EngineDead):
        await run
    await until(lambda: not cluster.gateway.hub.links, "the gateway has noticed")


async def test_drain_ends_streams_and_takes_no_more(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """A draining worker finishes its running requests, and new calls are sent to other workers."""
    draining = await cluster.add_worker(sim_engine(checkpoint, decode_ms=5), bundle)
    running = asyncio.ensure_future(cluster.stub.Chat(chat(max_tokens=60, ignore_eos=True)))
    await until(lambda: draining.end.statistics().running == 1, "the call runs")
    other = await cluster.add_worker(sim_engine(checkpoint, decode_ms=1), bundle)
    drained = asyncio.create_task(draining.end.drain(10))
    await until(lambda: any(not link.takes_new_requests for link in cluster.gateway.hub.links), "the gateway knows")
    for _ in range(5):
        await cluster.stub.Chat(chat(max_tokens=2, ignore_eos=True))
    assert await drained
    assert (await running).usage.completion_tokens == 60
    assert draining.end.statistics().tokens == 0
    assert other.engine.load().steps > 0


@pytest.mark.slow
async def test_controller_tells_catalog_and_hears_the_fleet(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle, tmp_path: Path
) -> None:
    """A gateway receives the catalog from the controller, and the controller receives the gateway's demand.

    A gateway that starts later without a controller still knows the last catalog."""
    end = ControllerLinks(
        controller_id="c",
        gateways=[cluster.gateway.endpoints["link"]],
        tls=None,
        bundles=lambda digest: bundle if digest == bundle.digest else None,
    )
    task = asyncio.create_task(end.run())
    entry = CatalogEntry(
        "sim", aliases=("default",), state=ModelState.LOADING, bundle_digest=bundle.digest, max_model_len=2048
    )
    end.publish([entry])
    await until(lambda: cluster.gateway.directory.find("default") is not None, "the catalog has come")
    waiting = asyncio.ensure_future(cluster.stub.Chat(chat(model="default", max_tokens=3, ignore_eos=True)))
    await until(lambda: any(d.waiting == 1 for d in end.demand()), "the controller sees the waiting call")
    await cluster.add_worker(sim_engine(checkpoint), bundle)
    assert (await waiting).usage.completion_tokens == 3
    await until(lambda: len(end.fleet()) == 1, "the controller sees the worker")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await until(lambda: cluster.gateway.hub.statistics().controllers == 0, "the controller is gone")
    assert (await cluster.stub.Chat(chat(model="default"))).choices, "everything serves without it"
    async with running_cluster(tmp_path) as later:
        assert later.gateway.directory.lookup.resolve("default").name == "sim"
        missing = await refused(later.stub.Chat(chat(model="nope")))
        assert missing.reason == "MODEL_NOT_FOUND"


async def _hello(call: Any) -> None:
    await call.write(pb.WorkerTurn(hello=pb.Hello(protocol_min=1, protocol_max=1, worker_id="x")))
    await read(call)


async def test_mutual_tls(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """If link_tls is configured, only a worker with a certificate of the cluster's CA can link."""
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    server = ours.issue("gateway")
    config = LOOPBACK.replace(
        "drain_timeout_s: 0",
        f"drain_timeout_s: 0\n  link_tls: {{cert_file: {server.cert_file}, key_file: {server.key_file}, "
        f"ca_file: {server.ca_file}}}",
    )
    async with running_cluster(tmp_path / "state", config) as cluster:
        await cluster.add_worker(sim_engine(checkpoint), bundle, tls=ours.issue("worker"))
        assert (await cluster.stub.Chat(chat(max_tokens=2))).choices
        stranger = theirs.issue("stranger")
        mixed = TlsFiles(stranger.cert_file, stranger.key_file, server.ca_file)
        for tls in (None, mixed):
            credentials = tls.channel_credentials() if tls else None
            address = cluster.gateway.endpoints["link"]
            channel = (
                grpc.aio.secure_channel(address, credentials) if credentials else grpc.aio.insecure_channel(address)
            )
            async with channel:
                call = pb_grpc.LinkStub(channel).Turn(timeout=3)
                with pytest.raises(grpc.aio.AioRpcError):
                    await _hello(call)
        assert len(cluster.gateway.hub.links) == 1
