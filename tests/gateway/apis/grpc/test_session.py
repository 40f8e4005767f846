"""Sessions: many calls on one stream. Each call has the same output as with StreamChat. All output of a tick (one pass
of the event loop) is sent in one message."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from cluster.wire.dial import read
from tests.http2.raw import raw_client
from tests.support.calls import chat, complete, rest_of, text_of
from tests.support.cluster import LOOPBACK, TestCluster, running_cluster, sim_engine, until
from tests.support.cpu import slowness

pytestmark = pytest.mark.slow


class ReceivedEvents:
    """The events that a client has received in a session, grouped by call."""

    def __init__(self) -> None:
        self.text: dict[int, str] = defaultdict(str)
        self.usage: dict[int, pb.Usage] = {}
        self.status: dict[int, str] = {}
        self.chunks: dict[int, list[Any]] = defaultdict(list)
        self.messages = 0

    def add(self, message: pb.SessionEvents) -> None:
        self.messages += 1
        for event in message.events:
            self.text[event.call_id] += event.text
            for kind in ("chat", "complete"):
                if not event.HasField(kind):
                    continue
                chunk = getattr(event, kind)
                self.chunks[event.call_id].append(chunk)
                for choice in chunk.choices:
                    if choice.index == 0:
                        self.text[event.call_id] += choice.delta.content if kind == "chat" else choice.text
                if chunk.HasField("usage"):
                    self.usage[event.call_id] = chunk.usage
            if event.status:
                self.status[event.call_id] = _reason(event.status)

    def ended(self, call_id: int) -> bool:
        return call_id in self.usage or call_id in self.status


def _reason(raw: bytes) -> str:
    for part in status_pb2.Status.FromString(raw).details:
        info = error_details_pb2.ErrorInfo()
        if part.Unpack(info):
            return str(info.reason)
    return ""


def start(call_id: int, request: pb.ChatRequest | pb.CompleteRequest, **fields: Any) -> pb.SessionRequest:
    """Return a session message that starts a call."""
    message = pb.SessionStart(call_id=call_id, **fields)
    if isinstance(request, pb.ChatRequest):
        message.chat.CopyFrom(request)
    else:
        message.complete.CopyFrom(request)
    return pb.SessionRequest(start=message)


async def gather(stream: Any, received: ReceivedEvents, *call_ids: int) -> None:
    """Read messages of a session until all calls in `call_ids` have ended."""
    while not all(received.ended(i) for i in call_ids):
        message = await asyncio.wait_for(read(stream), 60)
        assert message is not None, "the session ended early"
        received.add(message)


async def test_calls_of_a_session_are_those_of_streams(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """Forty concurrent calls of a session get the same text as calls of StreamChat, in far fewer messages than
    tokens."""
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=5), bundle)
    requests = [chat(f"call {i}", max_tokens=30, ignore_eos=True) for i in range(40)]
    alone = [text_of([c async for c in cluster.stub.StreamChat(r)]) for r in requests[:5]]
    stream = cluster.stub.Session()
    for i, request in enumerate(requests):
        await stream.write(start(i, request, request_id=f"r{i}"))
    received = ReceivedEvents()
    await gather(stream, received, *range(40))
    assert [received.text[i] for i in range(5)] == alone
    assert all(received.usage[i].completion_tokens == 30 for i in range(40))
    assert received.messages < 40 * 30 / 4
    await stream.done_writing()
    assert await read(stream) is None
    assert await stream.code() is grpc.StatusCode.OK
    await cluster.until_idle()


async def test_too_many_in_one_message_end_the_session(cluster: TestCluster) -> None:
    """A message with too many requests ends the session with INVALID_ARGUMENT."""
    stream = cluster.stub.Session()
    await stream.write(pb.SessionRequest(more=[pb.SessionRequest()] * 1001))
    with pytest.raises(grpc.aio.AioRpcError, match="at most 1000") as raised:
        await asyncio.wait_for(read(stream), 60)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("together", [False, True])
async def test_errors_cancels_and_deadlines_are_each_calls_own(
    cluster: TestCluster, checkpoint: Path, bundle: Bundle, together: bool
) -> None:
    """An invalid call, a cancelled call and a late call of a session each end with their own status. The other calls
    continue. This holds for requests in one message and in several."""
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=5), bundle)
    stream = cluster.stub.Session()
    requests = [
        start(1, chat(max_tokens=100, ignore_eos=True)),
        start(2, chat(model="nope")),
        start(3, chat(temperature=-1)),
        start(4, chat(max_tokens=2000, ignore_eos=True)),
        start(5, chat(max_tokens=2000, ignore_eos=True), deadline_ms=100),
        start(6, complete(max_tokens=5, ignore_eos=True, n=2, logprobs=True)),
        pb.SessionRequest(start=pb.SessionStart(call_id=7)),
        pb.SessionRequest(cancel=pb.SessionCancel(call_id=4)),
        pb.SessionRequest(cancel=pb.SessionCancel(call_id=99)),
    ]
    if together:
        requests = [pb.SessionRequest(start=requests[0].start, more=requests[1:])]
    for message in requests:
        await stream.write(message)
    received = ReceivedEvents()
    await gather(stream, received, *range(1, 8))
    assert received.usage[1].completion_tokens == 100
    assert received.status == {
        2: "MODEL_NOT_FOUND",
        3: "INVALID_FIELD",
        4: "CANCELLED",
        5: "DEADLINE_EXCEEDED",
        7: "INVALID_FIELD",
    }
    assert received.usage[6].completion_tokens == 10
    logprobs = [t for chunk in received.chunks[6] for c in chunk.choices for t in c.logprobs]
    assert len(logprobs) == 10
    await stream.done_writing()
    assert await stream.code() is grpc.StatusCode.OK
    await cluster.until_idle()


async def test_a_call_id_is_unique_while_it_runs(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """A second start with the id of a running call is refused without an effect on the running call. After the end of
    that call the id may be used again."""
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=5), bundle)
    stream = cluster.stub.Session()
    await stream.write(start(1, chat(max_tokens=20, ignore_eos=True)))
    await stream.write(start(1, chat(max_tokens=3, ignore_eos=True)))
    received = ReceivedEvents()
    while 1 not in received.usage:
        message = await read(stream)
        assert message is not None
        received.add(message)
    assert received.status[1] == "INVALID_FIELD"
    assert received.usage[1].completion_tokens == 20
    again = ReceivedEvents()
    await stream.write(start(1, chat(max_tokens=3, ignore_eos=True)))
    await gather(stream, again, 1)
    assert again.usage[1].completion_tokens == 3
    stream.cancel()


async def test_client_gone_ends_all_calls(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """The end of a cancelled session frees the slots of all calls of the session."""
    await cluster.add_worker(sim_engine(checkpoint, decode_ms=5, max_num_seqs=8), bundle)
    stream = cluster.stub.Session()
    for i in range(30):
        await stream.write(start(i, chat(max_tokens=2000, ignore_eos=True)))
    assert await read(stream) is not None
    stream.cancel()
    await cluster.until_idle()


async def test_an_unread_session_slows_nobody(cluster: TestCluster, checkpoint: Path, bundle: Bundle) -> None:
    """A client that does not read a session gets all output later. Meanwhile another call gets its tokens at the pace
    of the engine."""
    worker = await cluster.add_worker(sim_engine(checkpoint, decode_ms=2), bundle)
    stream = cluster.stub.Session()
    for i in range(32):
        await stream.write(start(i, chat(f"call {i}", max_tokens=300, ignore_eos=True)))
    await until(lambda: worker.engine.load().running == 32, "all run")
    before = worker.engine.load().steps
    answer = await cluster.stub.Chat(chat(max_tokens=200, ignore_eos=True))
    assert answer.usage.completion_tokens == 200
    assert worker.engine.load().steps - before <= 230
    received = ReceivedEvents()
    await gather(stream, received, *range(32))
    assert all(received.usage[i].completion_tokens == 300 for i in range(32))
    stream.cancel()


@pytest.mark.parametrize("by", ["age", "drain"])
async def test_a_session_retires_without_cutting_a_call(
    tmp_path: Path, checkpoint: Path, bundle: Bundle, by: str
) -> None:
    """A session that is old, or whose gateway is stopping, refuses new calls with NO_WORKER and ends after the last
    running call."""
    config = LOOPBACK.replace("drain_timeout_s: 0", "drain_timeout_s: 20")
    if by == "age":
        config = config.replace("drain_timeout_s: 20", "drain_timeout_s: 20\n  max_connection_age_s: 0.4")
    async with running_cluster(tmp_path, config) as cluster:
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=5), bundle)
        stream = cluster.stub.Session()
        await stream.write(start(1, chat(max_tokens=150, ignore_eos=True)))
        received = ReceivedEvents()
        received.add(await read(stream))
        if by == "drain":
            cluster.gateway.service.close("stopping")
        number = 2
        while "NO_WORKER" not in received.status.values():
            await stream.write(start(number, chat(max_tokens=1)))
            await gather(stream, received, number)
            number += 1
        await gather(stream, received, 1)
        assert received.usage[1].completion_tokens == 150
        assert await read(stream) is None
        assert await stream.code() is grpc.StatusCode.OK


async def test_malformed_requests(cluster: TestCluster) -> None:
    """A message that is not a SessionRequest ends the session with INVALID_ARGUMENT."""
    call: Any = cluster.channel.stream_stream("/cluster.v1.Inference/Session", request_serializer=lambda b: b)
    stream = call()
    await stream.write(b"\xff\xff\xff")
    assert await stream.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_refusals_that_nobody_reads_are_bounded(cluster: TestCluster) -> None:
    """A client starts calls that are all refused, and never reads the refusals. The gateway stops reading from this
    client before 1 MB is sent."""
    data = start(1, chat("x" * 1000, model="none")).SerializeToString()
    framed = b"\x00" + len(data).to_bytes(4, "big") + data
    async with raw_client(int(cluster.gateway.endpoints["grpc"].rpartition(":")[2]), window=1000) as raw:
        while not raw.events:  # the server's settings
            await raw.receive()
        stream_id, sent = await raw.call("Session", None, service="cluster.v1.Inference"), 0
        with suppress(TimeoutError):
            while sent < 10_000_000:
                if raw.h2.local_flow_control_window(stream_id) < len(framed):
                    await asyncio.wait_for(raw.receive(acknowledge=False), 1.0)
                    continue
                raw.h2.send_data(stream_id, framed)
                await raw.flush()
                sent += len(framed)
        assert len(framed) <= sent < 1_000_000
    assert (await cluster.stub.ListModels(pb.ListModelsRequest())) is not None


async def _longest_pass_s(cluster: TestCluster, messages: bytes) -> float:
    """Send `messages` to a session, then the start of an invalid call, and wait until it is refused. Return the CPU
    seconds of the event loop's longest iteration in this time."""
    loop, longest, last = asyncio.get_running_loop(), 0.0, time.thread_time()

    def tick() -> None:
        nonlocal longest, last
        now = time.thread_time()
        longest, last = max(longest, now - last), now
        if not done.is_set():
            loop.call_soon(tick)

    done = asyncio.Event()
    data = pb.SessionRequest(start=pb.SessionStart(call_id=1)).SerializeToString()
    async with raw_client(int(cluster.gateway.endpoints["grpc"].rpartition(":")[2])) as raw, asyncio.timeout(60):
        while not raw.events:
            await raw.receive()
        stream_id = await raw.call("Session", None, service="cluster.v1.Inference")
        last = time.thread_time()
        tick()
        for at in range(0, len(messages), 16_000):
            raw.h2.send_data(stream_id, messages[at : at + 16_000])
        raw.h2.send_data(stream_id, b"\x00" + len(data).to_bytes(4, "big") + data)
        await raw.flush()
        while stream_id not in raw.data:
            await raw.receive()
        done.set()
    return longest


async def test_messages_without_a_request_hold_nobody_up(cluster: TestCluster) -> None:
    """A flow-control window full of empty messages is read in time slices, not in one pass of the event loop."""
    await _longest_pass_s(cluster, bytes(5))  # this first run loads modules
    assert min([await _longest_pass_s(cluster, bytes(5 * 12_800)) for _ in range(3)]) < 0.02 * slowness()


async def test_a_session_ends_with_a_request_that_is_refused_at_once(cluster: TestCluster) -> None:
    """A session ends even if its only request is refused just when the client closes its side of the stream."""
    start = pb.SessionStart(call_id=1, chat=chat(model="none"))

    async def asked() -> list[pb.SessionEvent]:
        session = cluster.stub.Session()
        await session.write(pb.SessionRequest(start=start))
        await session.done_writing()
        return [event for message in await rest_of(session) for event in message.events]

    async with asyncio.timeout(60):
        answers = await asyncio.gather(*(asked() for _ in range(20)))
    assert all(event.status for (event,) in answers)


async def test_a_start_that_cannot_be_read_ends_its_call_alone(
    tmp_path: Path, checkpoint: Path, bundle: Bundle
) -> None:
    """A start with too many messages ends its own call with the error that the unary method gives. The other calls of
    the session continue."""
    async with running_cluster(tmp_path) as cluster:
        await cluster.add_worker(sim_engine(checkpoint, decode_ms=2), bundle)
        session, events = cluster.stub.Session(), ReceivedEvents()
        start = pb.SessionStart(call_id=1, chat=chat(max_tokens=100, ignore_eos=True))
        await session.write(pb.SessionRequest(start=start))
        events.add(await asyncio.wait_for(read(session), 30))
        large = chat(max_tokens=5)
        large.messages.extend([large.messages[0]] * 40_000)
        await session.write(pb.SessionRequest(start=pb.SessionStart(call_id=2, chat=large)))
        await session.done_writing()
        for message in await asyncio.wait_for(rest_of(session), 60):
            events.add(message)
        assert (events.status[2], events.usage[1].completion_tokens) == ("INVALID_FIELD", 100)
        await cluster.until_idle()
