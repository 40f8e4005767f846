"""Our answers equal the answers of vLLM's own OpenAI server on the same build of the engine. The tests compare text,
finish_reason, logprobs and usage.

EXCEPTIONS are the cases in which the two servers differ on purpose. A test below checks that each exception covers only
the case described here:

- completion-k-plus-one: for k alternatives, /v1/completions of vLLM returns k + 1 entries if the chosen token is
not among the k likeliest (OpenAI's old format has no other place for the chosen token), and one entry for k = 0.
Our CompleteChoice has the chosen token beside the alternatives, so it always has k alternatives, as in chat.
- impossible-alternatives: a grammar leaves fewer possible tokens than the alternatives requested. All other tokens
have a log probability of minus infinity, and on either side the sort decides at random which of these tokens are
named. Only the number of such tokens is compared.
- greedy-n: vLLM refuses several outputs at temperature 0 with a 400, since all are the same; we return them.
- more-than-the-context: vLLM refuses max_tokens above the model's context with a 400, however short the prompt is.
If only the prompt and max_tokens together exceed the context, vLLM cuts max_tokens. We cut in both cases.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from tests.differential.answers import Answer, differences, ours
from tests.differential.cases import END_IDS, Case, Earlier, Maker
from tests.differential.conftest import MAX_MODEL_LEN
from tests.differential.peer import Peer
from tests.support.cluster import TestCluster

pytestmark = [pytest.mark.engine, pytest.mark.thorough]

SEED = 20261124
PLAIN = 60
AT_ONCE = 8


async def _each(
    cases: Sequence[Case], ask: Callable[[Case], Awaitable[Answer]], at_once: int = AT_ONCE
) -> dict[int, Answer]:
    places = asyncio.Semaphore(at_once)

    async def ask_case(case: Case) -> tuple[int, Answer]:
        async with places:
            return case.number, await ask(case)

    async with asyncio.TaskGroup() as group:  # a failure cancels the other calls on the engine
        asked = [group.create_task(ask_case(case)) for case in cases]
    return dict(task.result() for task in asked)


async def _compare(
    cases: Sequence[Case], peer: Peer, cluster: TestCluster, at_once: int = AT_ONCE
) -> dict[int, Answer]:
    """Send the same cases to Headrace and to `peer`, and check that the answers are equal. Return the peer's answers.
    Headrace gets the cases in another order and so in other batches."""
    theirs = await _each(cases, peer.ask, at_once)
    shuffled = random.Random(SEED).sample(cases, len(cases))
    mine = await _each(shuffled, lambda case: ours(cluster.stub, case), at_once)
    wrong = {c.number: (c, problems) for c in cases if (problems := differences(c, theirs[c.number], mine[c.number]))}
    report = "\n".join(f"{case}\n  " + "\n  ".join(problems[:6]) for case, problems in list(wrong.values())[:8])
    assert not wrong, f"{len(wrong)} of {len(cases)} differ:\n{report}"
    return theirs


@pytest.fixture
async def both(peer: Peer, cluster: TestCluster) -> tuple[Peer, TestCluster]:
    """Return the two servers to compare, once both are ready: vLLM's own server, and the cluster with a Headrace
    gateway."""
    await peer.ready()
    return peer, cluster


@pytest.mark.parametrize("requests", [100, pytest.param(500, marks=pytest.mark.long)])
async def test_greedy_requests_are_answered_alike(requests: int, both: tuple[Peer, TestCluster]) -> None:
    """For random requests, Headrace's answers equal those of vLLM's own server in text, finish_reason, log
    probabilities and usage. Headrace streams half of its answers."""
    peer, cluster = both
    maker = Maker(SEED)
    plain = [maker.plain() for _ in range(PLAIN)]
    answers = await _compare(plain, peer, cluster)
    earlier = [
        Earlier(case.prompt, case.continues, choice.text, choice.token_ids)
        for case in plain
        for choice in answers[case.number].choices
    ]
    cases = [maker.any(earlier) for _ in range(requests - PLAIN)]
    answers |= await _compare(cases, peer, cluster)
    _assert_spread([*plain, *cases], answers, requests / 500)
    await cluster.until_idle()


def _assert_spread(cases: Sequence[Case], answers: dict[int, Answer], share: float) -> None:
    """Check that the requests were of many kinds, since few kinds would prove nothing. `share`: number of requests
    divided by 500; the required counts are multiplied by it."""
    answered = [case for case in cases if not answers[case.number].refused]
    choices = [choice for case in answered for choice in answers[case.number].choices]
    cut_by_stop = [
        case
        for case in answered
        if "stop" in case.options
        and any(c.finish_reason == "stop" and c.token_ids[-1] not in END_IDS for c in answers[case.number].choices)
    ]
    ended = [c for c in choices if c.token_ids and c.token_ids[-1] in END_IDS]
    counts = {
        "answered": len(answered),
        "chat": sum(case.is_chat for case in answered),
        "ids": sum(isinstance(case.prompt, tuple) and not case.is_chat for case in answered),
        "streamed": sum(case.streamed for case in answered),
        "continued": sum(case.continues for case in answered),
        "log probabilities": sum(case.top_logprobs is not None for case in answered),
        "grammars": sum(case.grammar is not None for case in answered),
        "cut by a stop string": len(cut_by_stop),
        "ended by an end token": len(ended),
        "ended by length": sum(c.finish_reason == "length" for c in choices),
        "prompts of several chunks": sum(answers[case.number].usage[0] > 256 for case in answered),
    }
    least = {"answered": 490, "chat": 200, "ids": 60, "streamed": 200, "log probabilities": 200, "ended by length": 200}
    assert all(count >= int(least.get(name, 25) * share) for name, count in counts.items()), counts


async def test_defaults_of_the_checkpoint_are_alike(both: tuple[Peer, TestCluster]) -> None:
    """Seeded calls without temperature or top_p use the values in the model's generation config. vLLM and Headrace
    sample the same tokens, also for n > 1.

    Calls are made one at a time, with prompts so short that all outputs fit into one step. An unmodified vLLM
    on CPU crashes if a seeded request has a chunked prefill.
    """
    maker = Maker(SEED + 1)
    options: list[dict[str, Any]] = [{}, {"temperature": 1.5}, {"top_p": 0.3}, {"top_k": 5, "min_p": 0.1}, {"n": 3}]
    cases = [
        Case(number, maker.prompt_ids(40), {"seed": number, "max_tokens": 16, **options[number % 5]}, 1)
        for number in range(20)
    ]
    cases = [dataclasses.replace(case, as_ids=True, streamed=case.number % 2 == 0) for case in cases]
    answers = await _compare(cases, *both, at_once=1)
    drawn = {
        tuple(choice.token_ids) for case in cases if "n" in case.options for choice in answers[case.number].choices
    }
    assert len(drawn) == 12, "a seed of its own for each output"


async def _both_ways(case: Case, both: tuple[Peer, TestCluster]) -> tuple[Answer, Answer]:
    return await both[0].ask(case), await ours(both[1].stub, case)


async def test_exception_completion_k_plus_one(both: tuple[Peer, TestCluster]) -> None:
    """For k alternatives to a token, vLLM's server returns one more entry than we do if the chosen token is not among
    the k likeliest tokens. Otherwise both return k entries."""
    prompt, forced = Maker(SEED).prompt_ids(20), {300: 100.0}
    for asked, bias, extra in ((2, forced, 1), (2, {}, 0), (0, forced, 1), (0, {}, 1)):
        case = Case(1, prompt, {"temperature": 0.0, "max_tokens": 1, "logit_bias": bias}, asked, as_ids=True)
        theirs, mine = await _both_ways(case, both)
        assert differences(case, theirs, mine) == []
        assert len(theirs.choices[0].logprobs["top_logprobs"][0]) == asked + extra
        assert len(mine.choices[0].logprobs[0].top_logprobs) == asked


async def test_exception_greedy_n(both: tuple[Peer, TestCluster]) -> None:
    """vLLM's server refuses a request for several outputs at temperature 0. Headrace's gateway returns the same output
    several times."""
    prompt = Maker(SEED).prompt_ids(20)
    theirs, mine = await _both_ways(Case(1, prompt, {"temperature": 0.0, "n": 3}), both)
    assert "n must be 1" in theirs.refused
    single = await ours(both[1].stub, Case(1, prompt, {"temperature": 0.0}))
    assert [choice.text for choice in mine.choices] == [single.choices[0].text] * 3
    assert mine.usage == (20, 3 * single.usage[1], 20 + 3 * single.usage[1])


async def test_exception_more_than_the_context(both: tuple[Peer, TestCluster]) -> None:
    """vLLM's server refuses max_tokens above the context length. Headrace's gateway cuts max_tokens to the context
    length, as both servers do with a long prompt."""
    prompt = Maker(SEED).prompt_ids(MAX_MODEL_LEN - 8)
    options = {"temperature": 0.0, "ignore_eos": True}
    theirs, cut = await _both_ways(Case(1, prompt, {**options, "max_tokens": MAX_MODEL_LEN}), both)
    assert differences(Case(1, prompt, {}), theirs, cut) == []
    assert (cut.usage[1], cut.choices[0].finish_reason) == (8, "length")
    theirs, mine = await _both_ways(Case(1, prompt, {**options, "max_tokens": MAX_MODEL_LEN + 1}), both)
    assert "max_tokens" in theirs.refused
    assert mine == cut
    too_long, full = await _both_ways(Case(1, Maker(SEED).prompt_ids(MAX_MODEL_LEN), options), both)
    assert too_long.refused
    assert full.refused
