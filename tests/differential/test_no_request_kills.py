"""No call kills the engine: odd, extreme, cut off and random calls over the public API.

tests/worker/engine/vllm/test_killers.py tests the engine's interface. The tests here include the gateway and the link,
and callers leave at random points. The content of answers is not checked, except for plain calls beside and after the
odd calls.
"""

from __future__ import annotations

import asyncio
import collections
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import psutil
import pytest

from cluster.api.outcomes import Outcome
from cluster.v1 import inference_pb2 as pb
from cluster.wire.dial import read
from tests.differential.cases import END_IDS, GRAMMARS, MODEL, VOCAB_SIZE, format_pb
from tests.support.calls import Answer, chat, refused
from tests.support.cluster import TestCluster
from tests.support.corpus import SAMPLES
from tests.worker.engine.vllm.test_killers import odd_grammars

pytestmark = [pytest.mark.engine, pytest.mark.thorough]

SEED = 4
CALLS = 300
MORE = 60
AT_ONCE = 12
PLAIN_EVERY = 20
LONGEST_S = 60.0
"""Upper bound on the duration of any call, in seconds."""

LATE = ("CANCELLED", "DEADLINE_EXCEEDED")
MUST_NOT_BE = ("", Outcome.INTERNAL.name, Outcome.WORKER_LOST.name, Outcome.NO_WORKER.name)

EXTREMES: dict[str, tuple[Any, ...]] = {
    "temperature": (0.0, 1e-38, 1e-6, 0.5, 1.0, 2.0),
    "top_p": (1e-6, 0.5, 1.0),
    "top_k": (-1, 0, 1, 50, 2**31 - 1),
    "min_p": (0.0, 0.5, 1.0),
    "seed": (0, 1, -1, 2**63 - 1, -(2**63)),
    "max_tokens": (1, 8, 40, 200),
    "min_tokens": (0, 1, 6),
    "frequency_penalty": (-2.0, 0.7, 2.0),
    "presence_penalty": (-2.0, 0.7, 2.0),
    "repetition_penalty": (0.01, 1.5, 100.0),
    "ignore_eos": (True, False),
    "n": (2, 7, 64),
}
WRONG: dict[str, tuple[Any, ...]] = {
    "temperature": (-1.0, math.nan, math.inf, 1e30),
    "top_p": (0.0, -0.5, 2.0, math.nan),
    "top_k": (-2, -(2**31)),
    "min_p": (-1.0, math.inf),
    "max_tokens": (0, -1, -(2**31)),
    "min_tokens": (-1, 2**31 - 1),
    "frequency_penalty": (3.0, math.nan),
    "repetition_penalty": (0.0, -1.0, 1e-30, 1e6, math.inf),
    "n": (0, -1, 65, 2**31 - 1),
    "top_logprobs": (21, -1, 2**31 - 1),
    "stop": ([""], ["x"] * 17, ["y" * 5000]),
    "stop_token_ids": ([-1], [VOCAB_SIZE], [2**31 - 1]),
    "logit_bias": ({-1: 1.0}, {VOCAB_SIZE: 1.0}, {5: math.nan}, {5: 1e38}),
}


@dataclass(frozen=True)
class OddCall:
    """A call with unusual parameters. `leave_after`: the caller leaves after this number of pieces of a stream, or of
    milliseconds of a unary call; None if the caller stays."""

    number: int
    request: Any
    streamed: bool
    timeout_s: float
    leave_after: int | None


class Oddities:
    """Random source of odd calls, with a seed."""

    def __init__(self, seed: int, max_model_len: int) -> None:
        self._random = random.Random(seed)
        self._max_model_len = max_model_len
        # A protobuf message cannot hold invalid Unicode.
        self._odd_grammars = [grammar for grammar in odd_grammars() if "\ud800" not in "".join(grammar.value)]

    def call(self, number: int, *, late: bool = False) -> OddCall:
        """Return the next random call with unusual parameters. `number`: number of the call. `late`: give the call a
        deadline that passes before its end."""
        chance = self._random
        fields: dict[str, Any] = {"max_tokens": chance.choice([4, 16, 48])}
        for name, values in EXTREMES.items():
            if chance.random() < (0.04 if name == "n" else 0.3):
                fields[name] = chance.choice(values)
        self._ids_and_bias(fields)
        if chance.random() < 0.35:
            fields["response_format"] = self._format(number)
        if chance.random() < 0.25:
            name = chance.choice(list(WRONG))
            fields[name] = chance.choice(WRONG[name])
            if name == "top_logprobs":
                fields["logprobs"] = True
        draw = chance.random() * (0.15 if late else 1.0)
        return OddCall(
            number=number,
            request=self._request(fields),
            streamed=chance.random() < 0.6,
            timeout_s=chance.uniform(0.001, 0.4) if draw < 0.15 else LONGEST_S,
            leave_after=chance.randint(0, 12) if 0.15 < draw < 0.4 else None,
        )

    def _ids_and_bias(self, fields: dict[str, Any]) -> None:
        chance = self._random
        everything = range(VOCAB_SIZE)
        if chance.random() < 0.3:
            fields["logit_bias"] = chance.choice(
                [
                    dict.fromkeys(everything, -100.0),
                    dict.fromkeys(everything, 100.0),
                    dict.fromkeys(END_IDS, 100.0),
                    {token: chance.uniform(-100, 100) for token in chance.sample(everything, 300)},
                ]
            )
        if chance.random() < 0.2:
            fields["stop_token_ids"] = chance.choice([[0], list(END_IDS), list(everything)])
        if chance.random() < 0.25:
            fields["stop"] = chance.choice([["e"], [" "], ["\ufffd"], ["\x00"], ["a" * 1024], list("abcdefghijklmnop")])
        if chance.random() < 0.25:
            fields |= {"logprobs": True, "top_logprobs": chance.choice([0, 1, 20])}

    def _format(self, number: int) -> pb.ResponseFormat:
        if number % 3:
            grammar = self._odd_grammars[number % len(self._odd_grammars)]
            if grammar.kind in ("choice", "regex", "grammar", "json_schema") and isinstance(
                grammar.value, (str, tuple)
            ):
                value = (
                    [grammar.value] if grammar.kind == "choice" and isinstance(grammar.value, str) else grammar.value
                )
                return format_pb(grammar.kind, value)
            return pb.ResponseFormat(type=grammar.kind)
        return format_pb(*self._random.choice(GRAMMARS))

    def _request(self, fields: dict[str, Any]) -> Any:
        chance = self._random
        kind = chance.random()
        if kind < 0.4:
            # Chunked prefill begins at 129 tokens. The last of these lengths leave no room for output, or are too long.
            length = chance.choice([1, 127, 128, 129, 257, 900, self._max_model_len - 1, self._max_model_len])
            ids = [chance.randrange(VOCAB_SIZE) for _ in range(length)]
            if chance.random() < 0.05:
                ids[-1] = chance.choice([-1, VOCAB_SIZE, 2**31 - 1])
            return pb.CompleteRequest(model=MODEL, prompt_token_ids=ids, **fields)
        text = "\n".join(chance.choices(SAMPLES, k=chance.choice([1, 3, 12])))
        if kind < 0.6:
            return pb.CompleteRequest(model=MODEL, prompt=text, **fields)
        messages = [pb.Message(role=chance.choice(["user", "assistant", "system", "tool"]), content=text)]
        return pb.ChatRequest(model=MODEL, messages=messages, continue_final_message=chance.random() < 0.2, **fields)


async def _outcome(stub: Any, odd: OddCall) -> str:
    """Make the call and return the error reason or status, or `OK` if the call was answered. Fails if an error is
    malformed."""
    kind = "Chat" if isinstance(odd.request, pb.ChatRequest) else "Complete"
    call = getattr(stub, f"{'Stream' if odd.streamed else ''}{kind}")(odd.request, timeout=odd.timeout_s)
    try:
        await (_read if odd.streamed else _wait)(call, odd.leave_after)
    except asyncio.CancelledError:
        return "CANCELLED"
    except grpc.aio.AioRpcError as error:
        answer = Answer(error)
        assert not any(word in answer.message for word in ("Traceback", 'File "', ".py")), answer
        if answer.code.name in LATE and not answer.reason:
            assert answer.code.name == "CANCELLED" or odd.timeout_s < LONGEST_S, (odd, answer)
            return str(answer.code.name)
        assert answer.reason not in MUST_NOT_BE, (odd, answer)
        assert answer.reason in Outcome.__members__, (odd, answer)
        return answer.reason
    return "OK"


async def _read(call: Any, leave_after: int | None) -> None:
    pieces = 0
    while leave_after is None or pieces < leave_after:
        if await read(call) is None:
            return
        pieces += 1
    call.cancel()
    raise asyncio.CancelledError


async def _wait(call: Any, leave_after: int | None) -> None:
    if leave_after is not None:
        asyncio.get_running_loop().call_later(leave_after / 1000, call.cancel)
    await call


async def _plain(stub: Any) -> list[int]:
    request = chat("What is the capital of France?", model=MODEL, max_tokens=24, logprobs=True, ignore_eos=True)
    answer = await stub.Chat(request, timeout=LONGEST_S)
    return [position.token_id for position in answer.choices[0].logprobs]


def _engine_processes() -> set[tuple[int, float]]:
    """Return vLLM's processes below this process, each by pid and start time."""
    processes = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if any("VLLM::" in word for word in process.cmdline()):
                processes.add((process.pid, process.create_time()))
        except psutil.NoSuchProcess:
            continue
    return processes


async def _search(
    stub: Any, odd_calls: Sequence[OddCall], reference: Sequence[int], at_once: int = AT_ONCE
) -> collections.Counter[str]:
    places = asyncio.Semaphore(at_once)

    async def make_call(odd: OddCall) -> str:
        async with places:
            outcome = await _outcome(stub, odd)
            if odd.number % PLAIN_EVERY == 0:
                assert await _plain(stub) == reference, f"a plain call beside {odd}"
            return outcome

    return collections.Counter(await asyncio.gather(*map(make_call, odd_calls)))


async def test_no_call_kills_the_engine(cluster: TestCluster) -> None:
    """Each of 300 unusual calls ends with a valid status. Plain calls at the same time get the right tokens. Afterwards
    the engine is idle and still runs."""
    reference = await _plain(cluster.stub)
    assert len(reference) == 24
    before = _engine_processes()
    assert before
    oddities = Oddities(SEED, cluster.workers[0].info.max_model_len)
    counts = await _search(cluster.stub, [oddities.call(number) for number in range(CALLS)], reference)
    least = {"OK": 60, "INVALID_FIELD": 60, "CANCELLED": 20, "DEADLINE_EXCEEDED": 15, "CONTEXT_LENGTH_EXCEEDED": 3}
    for more in range(CALLS, 2 * CALLS, MORE):
        if counts["DEADLINE_EXCEEDED"] >= least["DEADLINE_EXCEEDED"]:
            break
        # A busy machine rejects most deadlines before the engine sees the calls. With an empty queue such calls are
        # admitted.
        late = [oddities.call(number, late=True) for number in range(more, more + MORE)]
        counts += await _search(cluster.stub, late, reference, at_once=2)
    assert all(counts[name] >= number for name, number in least.items()), counts
    await cluster.until_idle()
    assert await _plain(cluster.stub) == reference
    assert _engine_processes() == before
    await cluster.workers[0].engine.check()
    await cluster.until_idle()


@pytest.mark.parametrize(
    ("kind", "value", "more", "field"),
    [
        ("grammar", "root ::= root", {}, "response_format"),
        ("json_schema", {"$ref": "#/a", "a": {"$ref": "#/a"}}, {}, "response_format.json_schema"),
        ("choice", ("yes", "no"), {"stop_token_ids": range(VOCAB_SIZE)}, "response_format"),
    ],
    ids=["endless-grammar", "endless-schema", "needed-tokens-stop"],
)
async def test_a_format_that_nothing_fits_is_the_callers_fault(
    cluster: TestCluster, kind: str, value: Any, more: dict[str, Any], field: str
) -> None:
    """If no token fits the format, the call fails with an error on response_format, not with an internal error."""
    answer = await refused(cluster.stub.Chat(chat(model=MODEL, response_format=format_pb(kind, value), **more)))
    assert (answer.reason, answer.fields) == ("INVALID_FIELD", [field])
    await cluster.until_idle()


async def test_the_last_outputs_seed_must_fit_too(cluster: TestCluster) -> None:
    """Output number i of a call uses `seed` + i. A call is refused if the seed of its last output exceeds the allowed
    range, and nothing is sent to a worker."""
    answer = await refused(cluster.stub.Chat(chat(model=MODEL, seed=2**63 - 2, n=3)))
    assert (answer.reason, answer.fields) == ("INVALID_FIELD", ["seed"])
    fits = await cluster.stub.Chat(chat(model=MODEL, seed=2**63 - 2, n=2), timeout=LONGEST_S)
    assert len(fits.choices) == 2
    await cluster.until_idle()
