"""Log probabilities of answers that are sent as a whole: encoded in slices while the model generates, in the same bytes
as a single encoding of the whole answer."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.outcomes import CallError, Outcome
from cluster.gateway.apis.grpc import answers as grpc_answers
from cluster.gateway.apis.openai import answers
from cluster.gateway.apis.openai.logprobs import ChatLogprobs, CompletionLogprobs, chat_logprobs
from cluster.gateway.apis.whole_logprobs import ChoiceLogprobs, WholeAnswer
from cluster.gateway.calls.unread_answers import LOGPROB_BYTES, AnswerBounds, UnreadAnswers
from cluster.gateway.text.logprobs import TokenLogprob
from cluster.v1 import inference_pb2 as pb
from tests.support.cluster import until
from tests.support.cpu import Steps
from tests.support.logprobs import generate, logprob_call

ENCODERS: Sequence[Callable[[], ChoiceLogprobs]] = (ChatLogprobs, CompletionLogprobs, grpc_answers.MessageLogprobs)

numbers = st.one_of(st.floats(-9999.0, 0.0), st.sampled_from([float("nan"), -0.0, -1e-17]))
alternatives = st.builds(TokenLogprob, st.integers(0, 2**31 - 1), st.text(max_size=5), st.binary(max_size=5), numbers)
tokens = st.builds(
    TokenLogprob,
    st.integers(0, 2**31 - 1),
    st.text(max_size=5),
    st.binary(max_size=5),
    numbers,
    st.lists(alternatives, max_size=3).map(tuple),
)


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def as_chat(logprobs: Sequence[TokenLogprob]) -> Any:
    """Return log probabilities in the shape of OpenAI's chat completions."""

    def one(t: TokenLogprob) -> dict[str, Any]:
        return {"token": t.token, "logprob": t.logprob, "bytes": list(t.token_bytes)}

    return {"content": [{**one(t), "top_logprobs": [one(other) for other in t.top]} for t in logprobs]}


def as_completion(logprobs: Sequence[TokenLogprob]) -> Any:
    """Return log probabilities in the shape of OpenAI's completions."""
    return {
        "text_offset": [sum(len(t.token) for t in logprobs[:i]) for i in range(len(logprobs))],
        "token_logprobs": [t.logprob for t in logprobs],
        "tokens": [t.token for t in logprobs],
        "top_logprobs": [{other.token: other.logprob for other in t.top} for t in logprobs],
    }


@given(st.lists(tokens, max_size=4))
def test_json_by_hand(some: list[TokenLogprob]) -> None:
    """The JSON of log probabilities equals that of the json module, byte for byte."""
    assert chat_logprobs(some) == compact(as_chat(some))
    for encoder, shape in ((ChatLogprobs(), as_chat), (CompletionLogprobs(), as_completion)):
        for t in some:
            encoder.add(t)
        assert b"".join(encoder.parts()).decode() == compact(shape(some) if some else None)


async def gathered(
    encoder: Callable[[], ChoiceLogprobs], steps: int = 3
) -> tuple[WholeAnswer, list[list[TokenLogprob]], Any]:
    """Return a whole answer with two choices, whose tokens arrived in several steps, with the log probabilities of each
    choice and the call. The second choice has no token."""
    call = logprob_call(outputs=2)
    whole = WholeAnswer(call, encoder, UnreadAnswers().answer("t"))
    gathering = asyncio.create_task(whole.gather())
    first: list[TokenLogprob] = []
    for _ in range(steps):
        await asyncio.sleep(0)
        first += generate(call, 2, 3)
    for sequence in call.sequences:
        sequence.finish("stop")
    call.output.wake()
    await gathering
    return whole, [first, []], call


async def test_a_chat_answer_is_the_same_json() -> None:
    """A chat answer with log probabilities has the bytes of the answer that is encoded at once."""
    whole, logprobs, call = await gathered(ChatLogprobs)
    head = {"id": "i", "object": "chat.completion", "created": 1, "model": "m"}
    choices = answers.chat_choices([call], whole.pieces)
    parts = await answers.answer_with_logprobs(head, choices, [whole], [call])
    for choice, some in zip(choices, logprobs, strict=True):
        choice["logprobs"] = as_chat(some) if some else None
    expected = answers.whole_answer("chat.completion", "i", "m", 1, choices, [call])
    assert b"".join(parts) == expected
    assert json.loads(expected)["choices"][0]["message"]["content"] == "xxxxxx"


async def test_a_completion_answer_is_the_same_json() -> None:
    """A completion with log probabilities has the bytes of the answer that is encoded at once."""
    whole, logprobs, call = await gathered(CompletionLogprobs)
    head = {"id": "i", "object": "text_completion", "created": 1, "model": "m"}
    choices = answers.completion_choices([call], whole.pieces)
    parts = await answers.answer_with_logprobs(head, choices, [whole], [call])
    for choice, some in zip(choices, logprobs, strict=True):
        choice["logprobs"] = as_completion(some) if some else None
    assert b"".join(parts) == answers.whole_answer("text_completion", "i", "m", 1, choices, [call])


async def test_a_grpc_response_is_the_same_message() -> None:
    """The serialized response parses to the message that protobuf builds from all log probabilities at once."""
    whole, logprobs, call = await gathered(grpc_answers.MessageLogprobs)
    builds: Sequence[Callable[..., Any]] = (grpc_answers.chat_response, grpc_answers.complete_response)
    for build in builds:
        expected = build(call, whole.pieces)
        data = b"".join(grpc_answers.response_with_logprobs(build(call, whole.pieces), whole.logprobs))
        for choice, some in zip(expected.choices, logprobs, strict=True):
            choice.logprobs.extend(grpc_answers.logprobs_pb(some))
        parsed = (pb.ChatResponse if isinstance(expected, pb.ChatResponse) else pb.CompleteResponse).FromString(data)
        parsed.created.CopyFrom(expected.created)
        assert parsed == expected


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("ended", [True, False], ids=["at the end", "before the end"])
async def test_the_event_loop_is_not_blocked(encoder: Callable[[], ChoiceLogprobs], ended: bool) -> None:
    """Many log probabilities that arrive together are encoded in slices: no step of the event loop takes a large share
    of the whole time, whether or not the output ends with them. The finished answer is not encoded a second time."""
    call = logprob_call()
    whole = WholeAnswer(call, encoder, UnreadAnswers().answer("t"))
    generate(call, 3000, 20)
    if ended:
        call.sequences[0].finish("length")
    else:
        asyncio.get_running_loop().call_soon(call.sequences[0].finish, "length")
        asyncio.get_running_loop().call_soon(call.output.wake)
    gc.disable()  # a collection examines the objects of all tests
    try:
        steps = Steps(whole.gather())
        await steps
    finally:
        gc.enable()
    assert steps.longest_s < steps.sum_s / 4, f"{steps.longest_s:.3f} s of {steps.sum_s:.3f} s"
    if encoder is not grpc_answers.MessageLogprobs:
        made = Steps(answers.answer_with_logprobs({}, answers.chat_choices([call], whole.pieces), [whole], [call]))
        await made
        assert made.sum_s < steps.sum_s / 4


@pytest.mark.parametrize("encoder", ENCODERS)
async def test_an_open_call_keeps_only_bytes(encoder: Callable[[], ChoiceLogprobs]) -> None:
    """While the model generates, the log probabilities that have arrived are encoded and dropped, for every choice."""
    call = logprob_call(outputs=2)
    whole = WholeAnswer(call, encoder, UnreadAnswers().answer("t"))
    gathering = asyncio.create_task(whole.gather())
    for _ in range(3):
        for index in range(2):
            generate(call, 2, 20, index)
        for _ in range(3):
            await asyncio.sleep(0)
        assert [sequence.pieces.logprobs for sequence in call.sequences] == [[], []]
    assert whole.size > 6 * 20
    gathering.cancel()


@pytest.mark.parametrize("encoder", ENCODERS)
async def test_the_memory_of_an_answer_counts(encoder: Callable[[], ChoiceLogprobs]) -> None:
    """An answer counts the log probabilities that have arrived and those that are encoded. When the budget is full, the
    call fails before all of them are encoded."""
    call = logprob_call()
    answers = UnreadAnswers(AnswerBounds(tenant=2_000_000))
    with answers.answer("t") as other, answers.answer("t") as unread:
        other.grow(1)
        whole = WholeAnswer(call, encoder, unread)
        gathering = asyncio.create_task(whole.gather())
        generate(call, 200, 20)
        await until(lambda: not call.output.unread_logprobs and whole.size > 200 * 20, "the tokens are encoded")
        assert 200 * 20 * 10 < unread.size <= 200 * 21 * LOGPROB_BYTES + whole.size
        generate(call, 1000, 20)
        with pytest.raises(CallError, match="lower n, max_tokens or top_logprobs"):
            await gathering
        assert answers.held <= 2_000_000
    assert not answers.held


async def test_a_failed_call_has_no_answer() -> None:
    """If the call fails after some tokens, its error is raised."""
    call = logprob_call()
    gathering = asyncio.create_task(WholeAnswer(call, ChatLogprobs, UnreadAnswers().answer("t")).gather())
    generate(call, 2, 2)
    await asyncio.sleep(0)
    call.fail(CallError(Outcome.WORKER_LOST, "the worker was lost"))
    with pytest.raises(CallError, match="the worker was lost"):
        await gathering
