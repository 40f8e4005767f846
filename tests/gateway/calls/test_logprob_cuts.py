"""Merged log probabilities of a client that reads slowly: they are sent in several chunks of bounded size."""

from __future__ import annotations

import asyncio
import itertools
import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.apis.grpc.chunk_encoders import CHAT, GrpcEncoder, encoder_for
from cluster.gateway.apis.openai.answers import ChatStream, SseEncoder
from cluster.gateway.calls import logprob_cuts, stream_writer
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.logprob_cuts import MAX_CHUNK_LOGPROBS, LogprobCuts
from cluster.gateway.calls.request import MAX_N, MAX_TOP_LOGPROBS
from cluster.gateway.calls.sequences.pieces import Piece
from cluster.gateway.calls.stream_writer import ChunkDelivery, StreamWriter
from cluster.gateway.calls.unread_answers import LOGPROB_BYTES, AnswerBounds, UnreadAnswers
from cluster.gateway.resume_tokens.token_chain import CallHead, decode
from cluster.gateway.resume_tokens.tokens import ResumeTokens
from cluster.v1 import inference_pb2 as pb
from tests.support.cluster import until
from tests.support.logprobs import generate, logprob_call

HEAD = CallHead("chatcmpl-1", "r1", "acme", "key:k1", "sim", "d1", "p1")


async def popped(call: Call) -> list[list[Piece]]:
    """Return the pieces of all chunks until the end of the call. Each cut wakes the call's API once."""
    cuts = LogprobCuts(call)
    chunks: list[list[Piece]] = []
    while not call.output.end_delivered:
        await asyncio.wait_for(call.output.news(), 1.0)
        chunks.append(cuts.pop_pieces())
    return chunks


async def test_merged_log_probabilities_are_cut() -> None:
    """No chunk has more log probabilities than allowed. Together the chunks have all log probabilities in order. The
    role comes with the first piece of a choice, and text and end come with its last piece."""
    call = logprob_call(outputs=2)
    expected = [generate(call, 500, 20, index) for index in range(2)]
    for sequence in call.sequences:
        sequence.finish("stop")
    chunks = await popped(call)
    assert len(chunks) == 11
    for chunk in chunks:
        assert 0 < sum(1 + len(t.top) for piece in chunk for t in piece.logprobs) <= MAX_CHUNK_LOGPROBS
    for index in range(2):
        pieces = [piece for chunk in chunks for piece in chunk if piece.index == index]
        assert [t for piece in pieces for t in piece.logprobs] == expected[index]
        assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
        assert [piece.text for piece in pieces] == [""] * (len(pieces) - 1) + ["x" * 500]
        assert [piece.finish_reason for piece in pieces] == [""] * (len(pieces) - 1) + ["stop"]


async def test_one_step_is_one_chunk() -> None:
    """The log probabilities that one step brings to the largest call are not cut."""
    assert MAX_N * (MAX_TOP_LOGPROBS + 2) <= MAX_CHUNK_LOGPROBS
    call = logprob_call(outputs=MAX_N)
    for index in range(MAX_N):
        generate(call, 1, MAX_TOP_LOGPROBS + 1, index)
    pieces = LogprobCuts(call).pop_pieces()
    assert [(piece.text, len(piece.logprobs)) for piece in pieces] == [("x", 1)] * MAX_N


async def test_log_probabilities_come_before_the_error() -> None:
    """A call that fails first delivers everything that waits, then its error."""
    call = logprob_call()
    expected = generate(call, 300, 20)
    call.fail(CallError(Outcome.WORKER_LOST, "the worker was lost"))
    cuts, pieces = LogprobCuts(call), list[Piece]()
    while not pieces or not pieces[-1].text:
        pieces += cuts.pop_pieces()
    with pytest.raises(CallError, match="the worker was lost"):
        cuts.pop_pieces()
    assert [t for piece in pieces for t in piece.logprobs] == expected
    assert pieces[-1].text == "x" * 300


class SlowClient:
    """A transport whose client reads one chunk at a time."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.full = False

    def send(self, data: bytes) -> None:
        """Implements Transport."""
        assert not self.full
        self.chunks.append(data)
        self.full = True

    async def wait_until_writable(self) -> None:
        """Implements Transport."""
        await asyncio.sleep(0)
        self.full = False


async def written(call: Call, encoder: Any) -> list[bytes]:
    """Return the chunks that a StreamWriter sends to a slow client until the call ends."""
    client = SlowClient()
    await asyncio.wait_for(StreamWriter(call, encoder, client, ChunkDelivery(UnreadAnswers())).run(), 10.0)
    assert encoder.ended
    return client.chunks


async def test_grpc_messages_stay_small() -> None:
    """A slow reader of a gRPC stream gets several messages, each far below the 4 MB that clients accept by default.
    Only the last message has the usage."""
    call = logprob_call()
    expected = generate(call, 2000, 20)
    call.sequences[0].finish("length")
    chunks = await written(call, GrpcEncoder(CHAT, call, cast(Any, None)))
    messages = [pb.ChatChunk.FromString(chunk) for chunk in chunks]
    assert max(map(len, chunks)) < 1 << 18
    assert [t.token_id for m in messages for c in m.choices for t in c.logprobs] == [t.token_id for t in expected]
    assert [m.HasField("usage") for m in messages] == [False] * (len(messages) - 1) + [True]
    assert [m.offset for m in messages] == list(range(1, len(messages) + 1))


async def test_events_stay_small() -> None:
    """A slow reader of server-sent events gets several events, each of bounded size."""
    call = logprob_call()
    expected = generate(call, 2000, 20)
    call.sequences[0].finish("length")
    chunks = await written(call, SseEncoder(call, ChatStream("i", "m", 1), 0, cast(Any, None)))
    assert max(map(len, chunks)) < 1 << 18
    events = [json.loads(chunk.removeprefix(b"data: "))["choices"][0] for chunk in chunks]
    assert sum(len(event["logprobs"]["content"]) for event in events) == len(expected)
    assert [event["delta"].get("role") for event in events] == ["assistant"] + [None] * (len(events) - 1)
    assert "".join(event["delta"]["content"] for event in events) == "x" * 2000
    assert events[-1]["finish_reason"] == "length"


async def test_resume_tokens_count_delivered_log_probabilities() -> None:
    """The resume token of each chunk has the ids whose log probabilities the chunk delivers. So a stream that breaks
    between two chunks loses no log probability, and repeats none."""
    call = logprob_call()
    generate(call, 300, 20)
    call.make_resumable(ResumeTokens(call.sequences, HEAD, lambda body: body, lambda: 0.0, 60.0))
    encoder = encoder_for(CHAT, call, cast(Any, None))
    while call.sequences[0].pieces.logprobs:
        chunk = pb.ChatChunk.FromString(encoder.encode_new())
        ((delta,), (choice,)) = chunk.choices, decode(chunk.resume_token)[3]
        assert list(choice.token_ids) == [t.token_id for t in delta.logprobs]
        assert len(choice.token_ids) <= MAX_CHUNK_LOGPROBS // 21
    assert choice.chars == 300
    assert chunk.offset == 4


async def test_a_pass_of_the_event_loop_writes_one_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream with many cuts writes one chunk at a time, and other callbacks of the event loop run in between."""
    monkeypatch.setattr(logprob_cuts, "MAX_CHUNK_LOGPROBS", 21)
    call = logprob_call()
    generate(call, 50, 20)
    call.sequences[0].finish("length")
    chunks: list[bytes] = []
    transport = SimpleNamespace(full=False, send=chunks.append)
    writer = StreamWriter(
        call, GrpcEncoder(CHAT, call, cast(Any, None)), cast(Any, transport), ChunkDelivery(UnreadAnswers())
    )
    writing = asyncio.create_task(writer.run())
    sent = [0]
    while not writing.done():
        await asyncio.sleep(0)
        sent.append(len(chunks))
    assert max(after - before for before, after in itertools.pairwise(sent)) == 1
    assert len(chunks) == 50


@pytest.mark.parametrize("tenant_bytes", [100 * 21 * LOGPROB_BYTES, 1 << 30])
async def test_unread_log_probabilities_count_in_the_budget(monkeypatch: pytest.MonkeyPatch, tenant_bytes: int) -> None:
    """While a client does not read its stream, the log probabilities that wait count in the budget for answers. If it
    has no room for them, the call ends with an error that names the remedy."""
    monkeypatch.setattr(stream_writer, "COUNT_S", 0.001)
    answers = UnreadAnswers(AnswerBounds(tenant=tenant_bytes, guaranteed=0))
    call, reads = logprob_call(), asyncio.Event()
    client = SimpleNamespace(full=True, send=lambda data: None, wait_until_writable=reads.wait)
    writer = StreamWriter(call, GrpcEncoder(CHAT, call, cast(Any, None)), cast(Any, client), ChunkDelivery(answers))
    with answers.answer("t") as other:
        other.grow(1)
        writing = asyncio.create_task(writer.run())
        generate(call, 101, 20)
        if tenant_bytes < 1 << 30:
            with pytest.raises(CallError, match="read answers faster"):
                await asyncio.wait_for(writing, 60.0)
            assert not call.output.unread_logprobs
        else:
            await until(lambda: answers.held > 1, "the log probabilities are counted")
            assert answers.held == 1 + 101 * 21 * LOGPROB_BYTES
            call.sequences[0].finish("length")
            client.full = False
            reads.set()
            await asyncio.wait_for(writing, 60.0)
        assert answers.held == 1
