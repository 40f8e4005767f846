"""Test each client of the load tests on a real server: a gateway with its own APIs, or a simulated engine behind an
OpenAI API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cluster.process.ports import free_port
from cluster.wire.bundle import Bundle
from loadtests.datasets import fixed
from loadtests.driver import Limits, drive
from loadtests.faces import CallFailed, Face
from loadtests.faces.grpc_stream import GrpcStream
from loadtests.faces.openai_sse import OpenAiSse
from loadtests.faces.session import Sessions
from loadtests.records import same_texts
from tests.loadtests.conftest import MODEL, SseServer
from tests.support.cluster import TestCluster, running_cluster, until
from tests.support.cluster import sim_engine as engine_of

LIMITS = Limits(call_s=20, run_s=60)
CHATS = fixed(12, 8, 20, seed=3)
COMPLETIONS = fixed(12, 8, 20, seed=3, chat=False)


@pytest.fixture
async def ours(bundle: tuple[Bundle, str], tmp_path: Path) -> AsyncIterator[TestCluster]:
    """Run a Headrace gateway with one worker. The worker's simulated engine has the same settings as the engine behind
    the OpenAI API with which these tests compare the gateway."""
    files, tokens = bundle
    ranges = dict(pair.split("=") for pair in tokens.split("&"))
    async with running_cluster(tmp_path) as cluster:
        engine = engine_of(Path("/"), decode_ms=2, vocab=768, max_model_len=2048, **ranges)
        await cluster.add_worker(engine, files, model=MODEL)
        yield cluster


@pytest.mark.parametrize("kind", ["grpc", "session"])
@pytest.mark.slow
@pytest.mark.thorough
async def test_our_faces_give_the_texts_of_a_plain_server(kind: str, ours: TestCluster, sse: SseServer) -> None:
    """Our APIs and the plain server answer the same requests with all tokens and with equal texts, for chats and for
    completions."""
    address = ours.gateway.endpoints["grpc"]
    mine: Face = GrpcStream(address, MODEL, channels=2) if kind == "grpc" else Sessions(address, MODEL, sessions=2)
    plain = OpenAiSse(sse.url, MODEL)
    try:
        for requests in (CHATS, COMPLETIONS):
            one = await drive(mine, requests, concurrency=6, limits=LIMITS)
            other = await drive(plain, requests, concurrency=6, limits=LIMITS)
            assert one.errors() == other.errors() == {}
            assert [r.tokens for r in one.good] == [r.tokens for r in other.good] == [20] * 12
            assert same_texts(one, other) == (12, 12)
    finally:
        await mine.close()
        await plain.close()


@pytest.mark.slow
async def test_no_token_waits_for_an_acknowledgement(ours: TestCluster) -> None:
    """On a kept-alive connection, the first token of a later call is not delayed by the 40 ms of a delayed ACK."""
    face = OpenAiSse(f"http://{ours.gateway.endpoints['http']}", MODEL)
    try:
        run = await drive(face, fixed(10, 8, 4, seed=5), concurrency=1, limits=LIMITS)
        assert min(record.ttft_s or 1.0 for record in run.good[1:]) < 0.035
    finally:
        await face.close()


@pytest.mark.parametrize("kind", ["grpc", "session", "http"])
async def test_an_unknown_model_is_a_refusal_with_its_status(kind: str, ours: TestCluster) -> None:
    """A call to an unknown model fails with the server's own status, and the server does not count as dead."""
    endpoints = ours.gateway.endpoints
    faces: dict[str, Face] = {
        "grpc": GrpcStream(endpoints["grpc"], "nobody", channels=1),
        "session": Sessions(endpoints["grpc"], "nobody", sessions=1),
        "http": OpenAiSse(f"http://{endpoints['http']}", "nobody"),
    }
    try:
        with pytest.raises(CallFailed) as failed:
            await faces[kind].run(CHATS[0], lambda text: None)
        assert failed.value.kind in ("status NOT_FOUND", "status 404")
        assert not failed.value.fatal
    finally:
        for face in faces.values():
            await face.close()


@pytest.mark.parametrize("kind", ["grpc", "session", "http"])
async def test_nobody_at_the_endpoint_is_unreachable(kind: str) -> None:
    """A call to a closed port fails at once as unreachable."""
    address = f"127.0.0.1:{free_port()}"
    faces: dict[str, Face] = {
        "grpc": GrpcStream(address, MODEL, channels=1),
        "session": Sessions(address, MODEL, sessions=1),
        "http": OpenAiSse(f"http://{address}", MODEL),
    }
    try:
        async with asyncio.timeout(60):
            with pytest.raises(CallFailed) as failed:
                await faces[kind].run(CHATS[0], lambda text: None)
        assert failed.value.kind == CallFailed.UNREACHABLE
    finally:
        for face in faces.values():
            await face.close()


async def test_a_server_cut_in_the_middle_leaves_a_partial_run(sse: SseServer) -> None:
    """If a server dies during a run, running streams break, later calls fail because no server answers, and the run
    ends early. The report names the server's death as the problem."""
    face = OpenAiSse(sse.url, MODEL)
    requests = [*fixed(4, 8, 4, seed=1), *fixed(200, 8, 500, seed=2)]
    running = asyncio.create_task(drive(face, requests, concurrency=4, limits=LIMITS))
    await until(
        lambda: sse.server.served == 8 and all(c.streaming for c in sse.connections), "four long answers are under way"
    )
    sse.die()
    run = await running
    assert run.problem.startswith("the server died")
    assert run.errors().get(CallFailed.BROKEN, 0) >= 1
    assert len(run.good) == 4


async def test_a_server_that_speaks_something_else_is_named() -> None:
    """A server that does not speak HTTP gives a protocol error with the server's first bytes."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example ESMTP\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    face = OpenAiSse(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", MODEL)
    try:
        with pytest.raises(CallFailed, match="220") as failed:
            await face.run(CHATS[0], lambda text: None)
        assert failed.value.kind == CallFailed.PROTOCOL
    finally:
        server.close()
