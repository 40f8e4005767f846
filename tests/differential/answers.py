"""Answers of vLLM's server and of Headrace in one neutral form, and the differences between two answers."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from cluster.gateway.text.logprobs import LEAST_LOGPROB
from cluster.v1 import inference_pb2 as pb
from tests.differential.cases import Case
from tests.support.calls import Answer as Refusal

LOGPROB_TOLERANCE = 1e-4
"""Tolerance between float32 log probabilities that were computed with different batches, chunks and cached blocks."""


@dataclass
class Choice:
    """One output of a call. The call was made to our gateway or to vLLM's server. `logprobs`: log probabilities, in the
    form of the server that was called. `token_ids`: empty if that server does not return them."""

    text: str = ""
    finish_reason: str = ""
    logprobs: Any = None
    token_ids: list[int] = field(default_factory=list)


@dataclass
class Answer:
    """Answer of one of the two compared servers. `refused`: the error message, if the server rejected the request as
    invalid."""

    choices: list[Choice] = field(default_factory=list)
    usage: tuple[int, int, int] = (0, 0, 0)
    refused: str = ""


# ---- answers of our gateway


async def ours(stub: Any, case: Case) -> Answer:
    """Call the gateway and return the answer. The pieces of a stream are joined."""
    method = f"{'Stream' if case.streamed else ''}{'Chat' if case.is_chat else 'Complete'}"
    answer = Answer(choices=[Choice(logprobs=[]) for _ in range(case.options.get("n", 1))])
    try:
        call = getattr(stub, method)(case.proto(), timeout=240)
        async for message in _messages(call, case.streamed):
            for choice in message.choices:
                _add(answer.choices[choice.index], choice)
            if message.HasField("usage"):
                usage = message.usage
                answer.usage = (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
            raise AssertionError(f"case {case.number}: {Refusal(error)}") from error
        return Answer(refused=Refusal(error).message)
    return answer


async def _messages(call: Any, streamed: bool) -> AsyncIterator[Any]:
    if not streamed:
        yield await call
        return
    async for message in call:
        yield message


def _add(to: Choice, choice: Any) -> None:
    if isinstance(choice, pb.CompleteChoice):
        to.text += choice.text
    else:
        to.text += (choice.delta if isinstance(choice, pb.ChoiceDelta) else choice.message).content
    assert not (choice.finish_reason and to.finish_reason), "an output ends once"
    to.finish_reason = to.finish_reason or choice.finish_reason
    to.logprobs += choice.logprobs
    to.token_ids += [position.token_id for position in choice.logprobs]


# ---- answers of the peer


def of_peer(status: int, body: Mapping[str, Any]) -> Answer:
    """Convert an HTTP answer of vLLM's server to an Answer, which can be compared with Headrace's answer."""
    if status == 400:
        return Answer(refused=str(body))
    assert status == 200, (status, body)
    usage = body["usage"]
    return Answer(
        choices=[
            Choice(
                text=(choice["message"]["content"] or "") if "message" in choice else choice["text"],
                finish_reason=choice["finish_reason"],
                logprobs=choice["logprobs"],
                token_ids=choice["token_ids"],
            )
            for choice in sorted(body["choices"], key=lambda choice: int(choice["index"]))
        ],
        usage=(usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]),
    )


# ---- comparison


def differences(case: Case, peer: Answer, own: Answer) -> list[str]:
    """Return a text for each difference between two answers; empty if they are equal."""
    if peer.refused or own.refused:
        return [] if peer.refused and own.refused else [f"refused: {peer.refused!r} against {own.refused!r}"]
    problems = _unequal("usage", peer.usage, own.usage)
    problems += _unequal("number of choices", len(peer.choices), len(own.choices))
    for i, (theirs, mine) in enumerate(zip(peer.choices, own.choices, strict=False)):
        problems += _unequal(f"choice {i} text", theirs.text, mine.text)
        problems += _unequal(f"choice {i} finish_reason", theirs.finish_reason, mine.finish_reason)
        if case.top_logprobs is None:
            problems += _unequal(f"choice {i} has log probabilities", False, bool(mine.logprobs))
        else:
            problems += _unequal(f"choice {i} token ids", theirs.token_ids, mine.token_ids)
            compare = _chat_logprobs if case.is_chat else _complete_logprobs
            problems += [f"choice {i} {what}" for what in compare(case, theirs.logprobs, mine.logprobs)]
    return problems


def _unequal(what: str, theirs: Any, mine: Any) -> list[str]:
    return [] if theirs == mine else [f"{what}: {theirs!r} against {mine!r}"]


def _name(case: Case, token: pb.TokenLogprob) -> str:
    return f"token_id:{token.token_id}" if case.as_ids else token.token


def _near(what: str, theirs: float, mine: float) -> list[str]:
    near = math.isclose(theirs, mine, rel_tol=0, abs_tol=LOGPROB_TOLERANCE)
    return [] if near else [f"{what}: {theirs} against {mine}"]


def _chat_logprobs(case: Case, theirs: Any, mine: Sequence[pb.TokenLogprob]) -> list[str]:
    """Compare `logprobs.content` of vLLM's server (`theirs`) with ours (`mine`), position by position. Text or id,
    bytes and log probability are compared, for each token and each alternative. Returns the differences."""
    problems = _unequal("positions", len(theirs["content"]), len(mine))
    for i, (position, token) in enumerate(zip(theirs["content"], mine, strict=False)):
        problems += _token(case, f"position {i}", position, token, with_bytes=True)
        problems += _unequal(f"position {i} alternatives", len(position["top_logprobs"]), len(token.top_logprobs))
        for rank, (other, alternative) in enumerate(zip(position["top_logprobs"], token.top_logprobs, strict=False)):
            problems += _token(case, f"position {i} rank {rank}", other, alternative, with_bytes=not case.as_ids)
    return problems


def _token(case: Case, at: str, theirs: Any, mine: pb.TokenLogprob, *, with_bytes: bool) -> list[str]:
    if theirs["logprob"] == mine.logprob == LEAST_LOGPROB:
        return []  # exception: impossible-alternatives
    problems = _unequal(f"{at} token", theirs["token"], _name(case, mine))
    if with_bytes:
        problems += _unequal(f"{at} bytes", bytes(theirs["bytes"]), mine.token_bytes)
    return problems + _near(f"{at} logprob", theirs["logprob"], mine.logprob)


def _complete_logprobs(case: Case, theirs: Any, mine: Sequence[pb.TokenLogprob]) -> list[str]:
    """Compare the `logprobs` of completions: the lists of tokens and numbers, and the map of alternatives of each
    position. Returns the differences."""
    problems = _unequal("tokens", theirs["tokens"], [_name(case, token) for token in mine])
    for i, token in enumerate(mine[: len(theirs["tokens"])]):
        problems += _near(f"position {i} logprob", theirs["token_logprobs"][i], token.logprob)
        problems += _alternatives(case, f"position {i}", theirs["top_logprobs"][i], token)
    return problems


def _alternatives(case: Case, at: str, theirs: Mapping[str, float], token: pb.TokenLogprob) -> list[str]:
    """Return the differences between the alternative tokens, with their log probabilities, that vLLM (`theirs`) and
    Headrace (`token`) list at one position of an answer. Alternatives that Headrace leaves out on purpose
    (test_differential.EXCEPTIONS) are not compared."""
    asked = case.top_logprobs or 0
    listed = _by_name(case, token.top_logprobs or [token])
    allowed = dict(theirs)
    if case.grammar is not None:  # exception: impossible-alternatives
        problems = _unequal(
            f"{at} impossible", *(sum(v == LEAST_LOGPROB for v in x.values()) for x in (theirs, listed))
        )
        if problems:
            return problems
        allowed, listed = _possible(allowed), _possible(listed)
    if asked and case.as_ids and len(theirs) == asked + 1 and len(listed) == asked:
        allowed.popitem()  # exception: completion-k-plus-one
    problems = _unequal(f"{at} alternatives", list(allowed), list(listed))
    return problems or [what for name in listed for what in _near(f"{at} {name!r}", allowed[name], listed[name])]


def _possible(alternatives: Mapping[str, float]) -> dict[str, float]:
    return {name: number for name, number in alternatives.items() if number != LEAST_LOGPROB}


def _by_name(case: Case, tokens: Iterable[pb.TokenLogprob]) -> dict[str, float]:
    """Return log probabilities by the text of the token, as vLLM's server (the peer) does. If several tokens have the
    same text, the last one is kept."""
    return {_name(case, token): token.logprob for token in tokens}
