"""The asyncio client works with a real gRPC server."""

from __future__ import annotations

import asyncio
import threading

import pytest
from google.rpc import code_pb2

from cluster.client import UNREACHABLE, AsyncClient, HeadraceError
from cluster.v1 import inference_pb2 as pb
from tests.support.scripted_gateway import WORDS, ScriptedGateway, refusal

TEXT = "".join(WORDS)


async def test_every_call_answers(gateway: ScriptedGateway) -> None:
    """Calls for whole answers, streams, tokens and models have the same results as in the blocking client."""
    gateway.script.models = [pb.Model(name=f"m{i}") for i in range(3)]
    gateway.script.page_size = 2
    async with AsyncClient(gateway.endpoint) as client:
        assert (await client.chat("tiny", "x")).text == TEXT
        assert (await client.complete("tiny", [1])).text == TEXT
        assert [t async for t in client.stream_complete("tiny", "x")] == list(WORDS)
        assert await client.detokenize("tiny", await client.tokenize("tiny", "Hi")) == "Hi"
        assert [m.name for m in await client.models()] == ["m0", "m1", "m2"]
        assert (await client.model("m2")).name == "m2"


async def test_stream_keeps_account(gateway: ScriptedGateway) -> None:
    """Iterating over a stream yields only texts, `chunks()` yields every chunk, and the usage is set at the end."""
    async with AsyncClient(gateway.endpoint) as client:
        stream = client.stream_chat("tiny", "x", request_id="r-1")
        assert [t async for t in stream] == list(WORDS)
        assert len([c async for c in client.stream_chat("tiny", "x").chunks()]) == 4
    assert stream.usage is not None
    assert (stream.text, stream.finish_reason, stream.usage.total_tokens, stream.request_id) == (
        TEXT,
        "stop",
        10,
        "r-1",
    )


async def test_errors_are_read(gateway: ScriptedGateway) -> None:
    """An error has a reason, and a failure in the middle of a stream is raised after the received text."""
    async with AsyncClient(gateway.endpoint) as client:
        with pytest.raises(HeadraceError, match="MODEL_NOT_FOUND: no model is called 'nope'"):
            await client.model("nope")
        gateway.script.break_after = 2
        stream = client.stream_chat("tiny", "x")
        with pytest.raises(HeadraceError, match="WORKER_LOST"):
            [t async for t in stream]
        assert stream.text == WORDS[0] + WORDS[1]


async def test_unavailable_is_retried(gateway: ScriptedGateway) -> None:
    """A call is retried if the gateway refused the call with UNAVAILABLE before any part of the answer."""
    gateway.script.refusals = [refusal(code_pb2.UNAVAILABLE, "NO_WORKER", "none", retry_after_s=0.05)]
    gateway.script.pushback_ms = 50
    async with AsyncClient(gateway.endpoint) as client:
        assert (await client.chat("tiny", "x")).text == TEXT
    assert len(gateway.script.requests) == 2


@pytest.mark.slow
async def test_nobody_there_is_unreachable() -> None:
    """A call to a closed port raises HeadraceError with the reason UNREACHABLE."""
    async with AsyncClient("127.0.0.1:1") as client:
        with pytest.raises(HeadraceError) as caught:
            await client.models(timeout_s=60)
    assert caught.value.reason == UNREACHABLE


@pytest.mark.parametrize("how", ["task", "with"])
async def test_leaving_ends_the_call(gateway: ScriptedGateway, how: str) -> None:
    """Cancelling the reading task or leaving the `async with` block ends the call at the gateway."""
    gateway.script.hold = threading.Event()
    async with AsyncClient(gateway.endpoint) as client:
        stream = client.stream_chat("tiny", "x")
        assert await anext(stream) == WORDS[0]
        if how == "task":
            waiting = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        else:
            async with stream:
                pass
        assert await asyncio.to_thread(gateway.script.ended.wait, 10)
