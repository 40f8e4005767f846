"""An admin verb over the Control stream returns the whole response, or raises the controller's error with all its
fields. If no reply arrives, it raises an error too.
"""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.outcomes import CallError, Outcome, Violation
from cluster.link.v1 import link_pb2 as pb
from cluster.wire import admin_forwarding
from cluster.wire.admin_forwarding import AdminRequests

GOOD, BAD = "Catalog.Good", "Catalog.Bad"


class Stream:
    """Both ends of a Control stream in one process. `sent` holds the gateway's requests."""

    def __init__(self, error: Exception | None = None) -> None:
        self.sent: list[pb.AdminRequest] = []
        self.questions = AdminRequests(lambda frame: self.sent.append(frame.admin_request), frozenset((GOOD, BAD)))
        self._error = error

    async def reply(self, request: pb.AdminRequest) -> None:
        """Answer a request as the controller would. The reply is encoded and decoded as on the wire."""

        async def good(body: bytes, actor: str) -> bytes:
            return body + actor.encode()

        async def bad(body: bytes, actor: str) -> bytes:
            assert self._error is not None
            raise self._error

        reply = await admin_forwarding.answer({GOOD: good, BAD: bad}, request)
        self.questions.handle_reply(pb.AdminReply.FromString(reply.SerializeToString()))


async def asked(stream: Stream, verb: str, body: bytes = b"", timeout_s: float = 60.0) -> asyncio.Task[bytes]:
    """Start to send a request, and return the task that waits for the response."""
    task = asyncio.create_task(stream.questions.ask(verb, body, "key:k1", timeout_s))
    await asyncio.sleep(0)  # the task's first step sends the request
    return task


async def test_answers_find_their_questions() -> None:
    """Replies in any order reach the right requests. A repeated or unknown reply changes nothing."""
    stream = Stream()
    tasks = [await asked(stream, GOOD, bytes([i])) for i in range(3)]
    for request in reversed(stream.sent):
        await stream.reply(request)
        await stream.reply(request)
    stream.questions.handle_reply(pb.AdminReply(id=99))
    assert [await task for task in tasks] == [bytes([i]) + b"key:k1" for i in range(3)]


@given(
    st.sampled_from([o for o in Outcome if o is not Outcome.OK]),
    st.text(max_size=20),
    st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), max_size=3),
    st.none() | st.floats(0, 100),
)
def test_an_error_travels_whole(
    outcome: Outcome, message: str, fields: list[tuple[str, str]], pause_s: float | None
) -> None:
    """If a forwarded admin method fails, the gateway raises an error with the same outcome, text, field violations and
    retry time."""
    raised = CallError(outcome, message, violations=[Violation(*field) for field in fields], retry_after_s=pause_s)

    async def run() -> CallError:
        stream = Stream(raised)
        task = await asked(stream, BAD)
        await stream.reply(stream.sent[0])
        with pytest.raises(CallError) as caught:
            await task
        return caught.value

    received = asyncio.run(run())
    assert (received.outcome, received.message, received.violations) == (outcome, message, raised.violations)
    assert received.retry_after_s == raised.retry_after_s


async def test_what_else_fails_tells_no_inside() -> None:
    """An unexpected exception in a verb becomes an INTERNAL error without the exception's text."""
    stream = Stream(RuntimeError("a secret path"))
    task = await asked(stream, BAD)
    await stream.reply(stream.sent[0])
    with pytest.raises(CallError, match="unexpected failure") as caught:
        await task
    assert caught.value.outcome is Outcome.INTERNAL
    assert "secret" not in caught.value.message


async def test_no_answer_is_told_as_what_it_is() -> None:
    """A gateway forwards an admin command to the controller. If there is no answer in time, or the stream is lost, the
    error says that the controller may have executed the command. A command that the controller does not know is never
    sent."""
    stream = Stream()
    late = await asked(stream, GOOD, timeout_s=0.01)
    with pytest.raises(CallError, match="may still do it"):
        await late
    lost = await asked(stream, GOOD)
    stream.questions.fail_all()
    with pytest.raises(CallError, match="look before you repeat"):
        await lost
    count = len(stream.sent)
    with pytest.raises(CallError, match="does not know Catalog") as caught:
        await stream.questions.ask("Catalog.Later", b"", "x")
    assert caught.value.outcome is Outcome.UNSUPPORTED_FEATURE
    assert len(stream.sent) == count


async def test_a_body_that_is_no_message_is_refused() -> None:
    """A forwarded admin command is refused if its body is not a message of the command's request type."""

    async def act(request: pb.Cordon, actor: str) -> pb.Cordon:
        return request

    made = admin_forwarding.verb(pb.Cordon, act)
    assert await made(b"", "x") == b""
    with pytest.raises(CallError) as caught:
        await made(b"\xff", "x")
    assert caught.value.outcome is Outcome.INVALID_FIELD
