"""The output of a call as its API reads it: updates, keep-alives, and the error after the text."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from cluster.api.outcomes import CallError, Outcome
from cluster.api.types import EngineRequest, Sampling
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.sequences.owner import CallEvents
from cluster.gateway.calls.sequences.sequence import OutputSequence
from cluster.policy.tenants.policy import TenantPolicy
from tests.gateway.text.test_parsed_text import PlainText

ERROR = CallError(Outcome.WORKER_LOST, "the worker was lost")


def call_with(outputs: int = 1) -> Call:
    """Return a call that has arrived at time 1 and runs."""
    call = Call("c", "m", TenantPolicy("t"), 0, 1.0, None, lambda: 2.0, cast("CallEvents[Any]", None))
    for index in range(outputs):
        request = EngineRequest("", [1], Sampling(max_tokens=99))
        call.sequences.append(OutputSequence(call, index, request, PlainText()))
    return call


async def test_an_update_wakes_the_api_once() -> None:
    """An update that arrives before or during a wait ends the wait. A listener, if set, gets each update instead."""
    output = call_with().output
    output.wake()
    output.wake()
    await output.news()
    waits = asyncio.create_task(output.news())
    await asyncio.sleep(0)
    assert not waits.done()
    output.wake()
    await waits
    heard: list[int] = []
    output.listen(lambda: heard.append(1))
    output.wake()
    output.wake()
    assert heard == [1, 1]


def test_a_keepalive_is_sent_once() -> None:
    """A silent call sends one keep-alive. Until the keep-alive is sent, `pop_text` returns None. Afterwards, the
    silence is measured from the keep-alive on."""
    output = call_with().output
    assert (output.silent_s(4.0), output.pop_keepalive()) == (3.0, False)
    output.fall_silent(4.0)
    assert output.pop_text() is None
    assert (output.pop_keepalive(), output.pop_keepalive(), output.silent_s(5.0)) == (True, False, 1.0)


def test_text_comes_before_the_error() -> None:
    """Only the first error of a call counts. It is raised after all text has been popped."""
    call = call_with()
    call.sequences[0].detokenizer.push([7, 7])
    call.fail(ERROR)
    call.fail(CallError(Outcome.INTERNAL, "another"))
    assert call.error is ERROR
    assert [piece.text for piece in call.output.pop_pieces()] == ["xx"]
    assert call.usage.completion_tokens == 2
    with pytest.raises(CallError, match="the worker was lost"):
        call.output.pop_pieces()


async def test_a_whole_answer_has_all_pieces() -> None:
    """A whole answer waits for the end of every sequence."""
    call = call_with(outputs=2)
    waits = asyncio.create_task(call.output.all_pieces())
    for sequence in call.sequences:
        await asyncio.sleep(0)
        assert not waits.done()
        sequence.detokenizer.push([7] * (sequence.index + 1))
        sequence.finish("stop")
        call.output.wake()
    pieces = await waits
    assert [(piece.index, piece.text, piece.finish_reason) for piece in pieces] == [(0, "x", "stop"), (1, "xx", "stop")]
    assert call.output.finished
    assert call.output.end_delivered


def test_the_end_of_a_guard_replaces_the_finish_reason() -> None:
    """If a guard refuses text at the very end, the sequence has the guard's finish reason."""
    call = call_with()
    (sequence,) = call.sequences
    sequence.finish("length")
    text = sequence.detokenizer
    assert isinstance(text, PlainText)
    text.refused = True
    call.output.pop_pieces()
    assert sequence.finish_reason == "content_filter"
