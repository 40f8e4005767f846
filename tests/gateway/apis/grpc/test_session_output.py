"""If the output of one call of a session cannot be written, only that call fails."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.apis.grpc.chunk_encoders import CHAT, GrpcEncoder
from cluster.gateway.apis.grpc.session_output import SessionOutput, SessionWriter
from cluster.gateway.calls.call_output import CallOutput
from cluster.gateway.calls.unread_answers import LOGPROB_BYTES, AnswerBounds, UnreadAnswers
from cluster.http2.h2_state import EndedStreams, ServerState
from cluster.http2.output import ConnectionOutput
from tests.support.cluster import until
from tests.support.logprobs import generate, logprob_call
from tests.support.transports import Sink


class WrittenCall:
    """A call whose encoder returns `data` at each update. With empty `data`, the encoder raises an exception."""

    def __init__(self, data: bytes) -> None:
        self.is_resumed = False
        self.error: CallError | None = None
        self._data = data
        pieces: Any = SimpleNamespace(pop_text=lambda: None, pending_chars=0)
        self.sequences: list[Any] = [SimpleNamespace(pieces=pieces, last_token_at=0.0)]
        self.output = CallOutput(self.sequences, cast(Any, None), 0.0)
        self.ended, self.plain = False, False

    def encode_new(self) -> bytes:
        if not self._data:
            raise RuntimeError("this encoder is broken")
        return self._data

    def fail_unexpectedly(self, error: BaseException) -> None:
        self.error = CallError(Outcome.INTERNAL, str(error))
        self.output.fail(self.error)
        self.output.wake()


async def test_a_call_whose_encoder_fails_delays_no_other_call() -> None:
    """The call whose encoder fails gets its status, and the other calls of the session continue."""
    sink, h2 = Sink(), ServerState(EndedStreams(1))
    connection = ConnectionOutput(sink, h2)
    context = SimpleNamespace(call_before_flush=connection.call_before_flush, send=connection.write, full=False)
    output = SessionOutput(context, asyncio.get_running_loop().create_future(), UnreadAnswers().answer("t"))

    async def write(call_id: int, call: WrittenCall) -> None:
        try:
            await SessionWriter(output, call_id, cast(Any, call), cast(Any, call)).run()
        except CallError as error:
            output.send_status(call_id, error)

    broken, sound = WrittenCall(b""), WrittenCall(b"[sound]")
    async with asyncio.TaskGroup() as tasks:
        writing = [tasks.create_task(write(1, broken)), tasks.create_task(write(2, sound))]
        await writing[0]
        for _ in range(3):
            sink.writes.clear()
            sound.output.wake()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert b"[sound]" in b"".join(sink.writes)
        writing[1].cancel()


async def test_whole_answers_wait_until_the_client_reads() -> None:
    """While the client does not read, answers of calls that do not stream wait, however small they are. They do not
    count as output that gathers, for which a session is closed."""
    reads, sent = asyncio.Event(), list[bytes]()
    context = SimpleNamespace(
        call_before_flush=asyncio.get_running_loop().call_soon,
        send=sent.append,
        full=True,
        unread_requests=False,
        wait_until_writable=reads.wait,
    )
    output = SessionOutput(context, asyncio.get_running_loop().create_future(), UnreadAnswers().answer("t"))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(output.send_whole(b"first"))
        await until(lambda: output.halted, "the client does not read")
        others = [tasks.create_task(output.send_whole(b"%d" % number)) for number in range(9)]
        for _ in range(5):
            await asyncio.sleep(0)
        assert (sent, output.parts) == ([b"first"], [])
        assert not any(other.done() for other in others)
        context.full = False
        reads.set()
    await until(lambda: not output.pass_scheduled, "the last answers are sent")
    assert b"".join(sent) == b"first" + b"".join(b"%d" % number for number in range(9))
    await output.close()


async def test_unread_log_probabilities_close_a_session() -> None:
    """The log probabilities that wait for a client that does not read count in the budget for answers. If it has no
    room for them, the session is closed."""
    context = SimpleNamespace(call_before_flush=lambda function: None, unread_requests=False, full=True)
    answers = UnreadAnswers(AnswerBounds(tenant=99 * 21 * LOGPROB_BYTES, guaranteed=0))
    with answers.answer("t") as other, answers.answer("t") as unread:
        other.grow(1)
        output = SessionOutput(context, asyncio.get_running_loop().create_future(), unread)
        call = logprob_call()
        writing = asyncio.create_task(SessionWriter(output, 1, call, GrpcEncoder(CHAT, call, cast(Any, None))).run())
        for tokens, is_too_much in ((98, False), (1, True)):
            generate(call, tokens, 20)
            await asyncio.sleep(0)
            assert output._is_too_much() is is_too_much
        await output.close()
        assert answers.held == 1
        writing.cancel()
