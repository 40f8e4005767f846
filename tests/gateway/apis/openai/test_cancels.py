"""Cancelled calls over HTTP. When a client disconnects, its calls leave the engine's slots at once, whether they wait,
prefill or decode. A slow client delays no other client."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path

import pytest

from cluster.api.types import CatalogEntry, ModelState
from cluster.wire.bundle import Bundle
from tests.support.cluster import TestCluster, running_cluster, sim_engine, until
from tests.support.http import Wire, chat_body, client, completion_body, fetch

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def outcomes(cluster: TestCluster) -> dict[str, float]:
    """Return the number of calls by outcome."""
    counted: dict[str, float] = {}
    for labels, count in cluster.gateway.metrics._counters["requests_total"].items():
        counted[labels[-1]] = counted.get(labels[-1], 0) + count
    return counted


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("where", ["queue", "prefill", "decode"])
async def test_a_client_gone_frees_its_place(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle, where: str, stream: bool
) -> None:
    """A call leaves the queue and the engine at once when the client disconnects, whether the call waits, prefills or
    decodes at that moment."""
    slow = {"prefill_tokens_per_s": 5} if where == "prefill" else {}
    worker = await cluster.add_worker(sim_engine(checkpoint, decode_ms=5, max_num_seqs=1, **slow), bundle)
    body = chat_body(max_tokens=3000, ignore_eos=True, stream=stream)
    wires = [await Wire.open(cluster) for _ in range(4 if where == "queue" else 1)]
    for wire in wires:
        wire.ask(CHAT, body)
    if where == "queue":
        await until(lambda: cluster.gateway.scheduler.queues.waiting("sim")[0] >= 1, "a call waits")
    elif where == "prefill":
        await until(lambda: worker.engine.load().running == 1, "the call is in prefill")
    else:
        await until(lambda: any(c.first_token_at is not None for c in cluster.gateway.service.calls), "tokens come")
    for wire in wires:
        await wire.close()
    await cluster.until_idle(5 if where == "prefill" else 2)
    assert outcomes(cluster) == {"cancelled": len(wires)}


async def test_the_official_client_closes_a_stream(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """If the official client closes a stream, the stream's call ends, and the client's next call is answered."""
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=5), bundle)
    async with client(cluster) as ai:
        stream = await ai.chat.completions.create(
            **chat_body(max_tokens=3000, extra_body={"ignore_eos": True}), stream=True
        )
        async for _ in stream:
            break
        await stream.close()
        await cluster.until_idle(2)
        assert (await ai.chat.completions.create(**chat_body(max_tokens=4))).choices


async def test_one_of_several_prompts_does_not_outlive_the_others(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """All calls of a request with several prompts end together when the client disconnects or one prompt is invalid."""
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=5), bundle)
    wire = await Wire.open(cluster)
    wire.ask(COMPLETIONS, completion_body(["a", "b", "c"], n=2, max_tokens=3000, ignore_eos=True, stream=True))
    await wire.head()
    assert await wire.chunk()
    await wire.close()
    await cluster.until_idle(2)
    assert (await fetch(cluster, COMPLETIONS, completion_body(["a", ""]))).status == 400
    assert (await fetch(cluster, COMPLETIONS, completion_body([[1], [-1]]))).status == 400
    await cluster.until_idle(2)


async def test_hundreds_gone_at_once(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """Three hundred streams, some running and some waiting, leave no calls behind when their connections break at the
    same time."""
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=5, max_num_seqs=32), bundle)
    wires = await asyncio.gather(*(Wire.open(cluster) for _ in range(300)))
    for wire in wires:
        wire.ask(CHAT, chat_body(max_tokens=500, ignore_eos=True, stream=True))
    await until(lambda: sum(cluster.gateway.service.statistics().values()) == 300, "all calls are under way")
    for wire in wires:
        wire.writer.transport.abort()
    await cluster.until_idle(5)
    assert outcomes(cluster) == {"cancelled": 300}
    assert (await fetch(cluster, CHAT, chat_body(max_tokens=4))).status == 200


@pytest.mark.slow
async def test_a_slow_reader_gets_its_text_in_fewer_events(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle
) -> None:
    """Tokens for a client that does not read are merged, so that memory does not grow with each token. Such a client
    does not delay the engine and loses no text."""
    worker = await cluster.add_worker(
        sim_engine(checkpoint, decode_ms=0.1, max_model_len=8_000, kv_blocks=4_000), bundle
    )
    body = completion_body(max_tokens=6_000, logprobs=20, ignore_eos=True)
    expected = (await fetch(cluster, COMPLETIONS, body)).json["choices"][0]["text"]
    host, port = cluster.gateway.endpoints["http"].rsplit(":", 1)
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.setblocking(False)
    await asyncio.get_running_loop().sock_connect(raw, (host, int(port)))
    wire = Wire(*await asyncio.open_connection(sock=raw, limit=1024))
    wire.ask(COMPLETIONS, {**body, "stream": True})
    assert (await wire.head())[0] == 200
    await until(lambda: worker.engine.load().running == 0, "the engine finishes although the client does not read", 60)
    events = []
    while chunk := await wire.chunk():
        events.append(chunk)
    await wire.close()
    data = [block.removeprefix("data: ") for chunk in events for block in chunk.decode().split("\n\n") if block]
    assert data[-1] == "[DONE]"
    assert len(data) < 5_500
    assert "".join(json.loads(item)["choices"][0]["text"] for item in data[:-1]) == expected


async def test_a_body_that_never_comes(cluster: TestCluster) -> None:
    """A client that disconnects before its request is complete leaves no running request behind, and no error in the
    log."""
    wire = await Wire.open(cluster)
    wire.ask(CHAT, b'{"model"', content_length="1000")
    await until(lambda: bool(cluster.gateway.ports.http._state.tasks), "the request is being read")
    await wire.close()
    await until(lambda: not cluster.gateway.ports.http._state.tasks, "its task has ended")


async def test_stopping_lets_streams_end(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """A stopping gateway refuses new connections, closes idle connections at once, and lets streams finish."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=5), bundle)
        idle, busy = await Wire.open(cluster), await Wire.open(cluster)
        idle.ask("/health")
        await idle.reply()
        busy.ask(CHAT, chat_body(max_tokens=60, ignore_eos=True, stream=True))
        await busy.head()
        stopping = asyncio.create_task(cluster.gateway.ports.http.stop(20))
        assert await idle.reader.read() == b""
        with pytest.raises(ConnectionRefusedError):
            await Wire.open(cluster)
        chunks = []
        while chunk := await busy.chunk():
            chunks.append(chunk)
        assert chunks[-1] == b"data: [DONE]\n\n"
        await stopping
        await idle.close()
        await busy.close()


async def test_stopping_does_not_wait_for_ever(tmp_path: Path, bundle: Bundle) -> None:
    """Calls that still run at the end of the drain are ended and leave nothing behind in the gateway."""
    async with running_cluster(tmp_path) as cluster:
        await asyncio.to_thread(bundle.save, tmp_path / "bundles" / bundle.digest.replace(":", "-"))
        entry = CatalogEntry("sim", state=ModelState.LOADING, bundle_digest=bundle.digest, max_model_len=256)
        cluster.gateway.worker_events.apply_catalog([entry])
        wire = await Wire.open(cluster)
        wire.ask(CHAT, chat_body(stream=True))
        await until(lambda: bool(cluster.gateway.service.statistics()), "the call waits")
        await cluster.gateway.ports.http.stop(0.01)
        assert await wire.reader.read() == b""
        assert cluster.gateway.service.statistics() == {}
        await wire.close()
