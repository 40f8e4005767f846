"""Fuzz tests of everything that callers may send: bytes, messages, frames, JSON and headers. `make fuzz FUZZ_S=600`
runs them longer."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from hypothesis import strategies as st

from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from tests.support.calls import chat
from tests.support.cluster import TestCluster, running_cluster, sim_engine
from tests.support.fuzz import batches, each, messages, nothing_unexpected
from tests.support.http import Wire, chat_body, completion_body

pytestmark = pytest.mark.slow

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"]
CALL_S = 1.0


@pytest.fixture
async def cluster(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> AsyncIterator[TestCluster]:
    """A gateway with one worker."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=0.2), bundle)
        yield cluster


async def check_healthy(cluster: TestCluster) -> None:
    """Check that both APIs answer a normal call, and that no other call remains."""
    assert (await cluster.stub.Chat(chat(max_tokens=3, ignore_eos=True), timeout=60)).usage.completion_tokens == 3
    wire = await Wire.open(cluster)
    wire.ask("/v1/chat/completions", chat_body(max_tokens=3))
    assert (await asyncio.wait_for(wire.reply(), 60)).status == 200
    await wire.close()
    await cluster.until_idle()


def calls() -> st.SearchStrategy[tuple[str, bytes]]:
    """Return a strategy that draws the name of a method and the bytes to send to it: arbitrary bytes, a message of this
    method, or a message of another method."""
    kinds = [pb.DESCRIPTOR.message_types_by_name[method.input_type.name] for method in SERVICE.methods]
    classes: list[type[Message]] = [getattr(pb, kind.name) for kind in kinds]
    said = st.sampled_from(["sim", "sim", "sim", "default", "", "x"])
    any_message = st.one_of(*(messages(kind, **_model(kind, said)) for kind in classes))
    data = st.binary(max_size=200) | any_message.map(lambda message: bytes(message.SerializeToString()))
    own = st.one_of(
        *(
            st.tuples(
                st.just(method.name), messages(kind, **_model(kind, said)).map(lambda m: bytes(m.SerializeToString()))
            )
            for method, kind in zip(SERVICE.methods, classes, strict=True)
        )
    )
    return own | st.tuples(st.sampled_from([method.name for method in SERVICE.methods]), data)


def _model(kind: type[Message], said: st.SearchStrategy[str]) -> dict[str, st.SearchStrategy[Any]]:
    return {"model": said} if "model" in kind.DESCRIPTOR.fields_by_name else {}


async def test_grpc_messages(cluster: TestCluster) -> None:
    """A call of any method with any bytes or any message gets an expected status in time."""
    async with nothing_unexpected():
        for batch in batches(calls()):

            async def attack(call: tuple[str, bytes]) -> None:
                method, data = call
                path = f"/{SERVICE.full_name}/{method}"
                stream: Any = cluster.channel.stream_stream(path)(timeout=CALL_S)
                with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    await stream.write(data)
                    await stream.done_writing()
                    async for _ in stream:
                        pass
                code = await stream.code()
                assert code.name != "UNKNOWN", await stream.details()

            await each(batch, attack)
            await check_healthy(cluster)


def frames() -> st.SearchStrategy[bytes]:
    """Return a strategy that gives either one HTTP/2 frame or random bytes. The frame is built by hand, so that every
    field may be wrong."""
    # the header block of :method POST, :scheme http, :path /x/Chat, content-type application/grpc
    head = b"\x83\x86\x44\x07/x/Chat\x5f\x10application/grpc"
    chosen = st.sampled_from([head, head, head.replace(b"/x/Chat", b"/x/\xff\x00\r\n"), b"\x82\x86\x84", b"\x00" * 8])
    number = st.integers(0, (1 << 32) - 1).map(lambda n: n.to_bytes(4, "big"))
    setting = st.builds(lambda key, value: key.to_bytes(2, "big") + value, st.integers(0, 9), number)
    payload = chosen | number | setting | st.binary(max_size=60) | st.just(b"\0" * 8) | st.just(b"\0\0\0\0\x05hello")
    kind, flags = st.integers(0, 10), st.sampled_from([0, 1, 4, 5, 5, 8, 0x20, 0x2D, 255])
    stream = st.sampled_from([0, 1, 1, 1, 1, 3, 5, 2, (1 << 31) - 1])
    return st.builds(frame, kind, flags, stream, payload) | st.binary(max_size=60)


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return an encoded frame."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"")


async def test_http2_frames(cluster: TestCluster) -> None:
    """A connection on the gRPC port may send any frames in any order. They may end this connection, but no other
    connection."""
    address = cluster.gateway.endpoints["grpc"]
    async with nothing_unexpected():
        for batch in batches(st.tuples(st.booleans(), st.lists(frames(), max_size=12))):

            async def attack(sent: tuple[bool, list[bytes]]) -> None:
                greets, parts = sent
                await send_and_disconnect(address, [PREFACE, *parts] if greets else parts)

            await each(batch, attack)
            await check_healthy(cluster)


async def send_and_disconnect(address: str, parts: list[bytes]) -> None:
    """Send the parts, read the answer for at most CALL_S seconds, and disconnect."""
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    with contextlib.suppress(ConnectionError):
        for part in parts:
            writer.write(part)
            await writer.drain()
        writer.write_eof()
    with contextlib.suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(CALL_S):
            while await reader.read(65_536):
                pass
    writer.transport.abort()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["model", "messages", "prompt", "max_tokens", "temperature", "stop", "stream", "n", "tools", "logprobs", "seed"]
KEYS += ["response_format", "top_p", "logit_bias", "stream_options", "tool_choice", "user", "min_p", "top_logprobs"]
KEYS += ["parallel_tool_calls", "reasoning_effort", "thinking_token_budget", "documents", "priority"]


def bodies() -> st.SearchStrategy[bytes]:
    """Return a strategy that generates request bodies. A body is a request with some changed fields, any other JSON, or
    bytes that are not JSON."""
    good = st.sampled_from([chat_body(), completion_body(), chat_body(stream=True), completion_body(stream=True)])
    changed = st.builds(
        lambda body, more: {**body, **more}, good, st.dictionaries(st.sampled_from(KEYS), JSON, max_size=2)
    )
    inside = st.builds(
        lambda body, more: {**body, "messages": more}, good, st.lists(JSON | messages_json(), max_size=3)
    )
    return (changed | inside | JSON).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=80)


def messages_json() -> st.SearchStrategy[Any]:
    """Return a strategy for a message whose parts are any JSON."""
    names = ["role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"]
    return st.dictionaries(st.sampled_from(names), st.sampled_from(["user", "assistant"]) | JSON, max_size=4)


def requests() -> st.SearchStrategy[bytes]:
    """Return a strategy for a complete HTTP request whose head is usually correct."""
    paths = ["/v1/chat/completions"] * 4 + ["/v1/completions"] * 2 + ["/v1/models", "/v1/models/x", "/health", "/ready"]
    path = st.sampled_from([*paths, "/", "//", "/v1/%00", "*"])
    method = st.sampled_from(["POST"] * 6 + ["GET", "PUT", "", "OPTIONS", "\x00"])
    value = st.sampled_from(["application/json", "chunked", "-1", "99999999999999", "gzip", "close", "", "a" * 9000])
    name = st.sampled_from(
        ["content-type", "transfer-encoding", "content-length", "authorization", "x-request-id", "host"]
    )
    fields = st.dictionaries(
        name | st.text("abc-:\r\n \0é", max_size=6), value | st.text("az09:;=\r\n\0é", max_size=9), max_size=3
    )

    def build(method: str, path: str, fields: dict[str, str], body: bytes, length: int) -> bytes:
        named = {"host": "x", "content-type": "application/json", "content-length": str(len(body) + length)} | fields
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items())]
        return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n" + body

    lengths = st.sampled_from([0, 0, 0, 0, -1, 5])
    return st.builds(build, method, path, fields | st.just({}), bodies(), lengths) | st.binary(max_size=100)


async def test_http_requests(cluster: TestCluster) -> None:
    """Any request to the HTTP API gets either no answer or an answer with a status below 500. It ends no connection
    except its own."""
    address = cluster.gateway.endpoints["http"]
    async with nothing_unexpected():
        for batch in batches(requests()):
            await each(batch, lambda sent: send_and_disconnect(address, [sent]))
            await check_healthy(cluster)


async def test_http_bodies(cluster: TestCluster) -> None:
    """Any body in a correct request gets an answer or a client error, never a server error."""
    async with nothing_unexpected():
        for batch in batches(st.tuples(st.sampled_from(["/v1/chat/completions", "/v1/completions"]), bodies())):

            async def attack(sent: tuple[str, bytes]) -> None:
                wire = await Wire.open(cluster)
                wire.ask(sent[0], sent[1])
                try:
                    async with asyncio.timeout(CALL_S):
                        reply = await wire.reply()
                    assert reply.status < 500, reply.body
                except TimeoutError:
                    pass  # the call asks for many tokens
                finally:
                    await wire.close()

            await each(batch, attack)
            await check_healthy(cluster)
