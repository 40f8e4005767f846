"""The golden check rejects engines that compute wrong answers, accepts healthy engines, and does not affect the
callers' requests."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.ports import EngineCorrupt, EngineRefused
from cluster.api.types import (
    RESUME_EXACT,
    RESUME_PLAIN,
    RESUME_STATE,
    EngineInfo,
    EngineRequest,
    FinishReason,
    PositionLogprobs,
    TokenOutput,
)
from cluster.worker.engine.golden_check import (
    ANSWER_TOKENS,
    PREFIX,
    PROMPT_TOKENS,
    SHORT,
    CheckedEngine,
    Golden,
    GoldenAnswer,
    golden_request,
    long_prompt_tokens,
    why_wrong,
)
from cluster.worker.engine.simulated.engine import SimConfig, SimEngine, VirtualClock
from tests.worker.engine.contract import Driver, EngineContract, Subject, request

SMALL = SimConfig(vocab=1000, token_lo=100, token_hi=900, eos=2, max_model_len=256, max_num_seqs=4, kv_blocks=64)


async def subject() -> tuple[SimEngine, Driver]:
    """Return a healthy simulated engine, and a Driver that runs requests on it. The Driver's requests pass through
    CheckedEngine, which checks the engine's answers."""
    engine = SimEngine(SMALL, VirtualClock())
    examined = CheckedEngine(engine, node="n1")
    return engine, Driver(Subject(examined, await examined.start(), 100, 900, deadline_s=5.0, kv_events=engine))


class TestContract(EngineContract):
    """The engine contract for an engine with the golden check."""

    @pytest.fixture
    async def engine(self) -> AsyncIterator[Subject]:
        """A simulated engine with the golden check."""
        engine, driver = await subject()
        yield driver.subject
        assert engine.statistics().kv_used_blocks == 0


async def test_an_error_of_a_well_engine_changes_nothing() -> None:
    """If a request ends in an error, the healthy engine is checked with the golden (fixed) prompt. Other requests keep
    their tokens."""
    engine, driver = await subject()
    (undisturbed,) = await driver.run(request(driver.subject.prompt(2), 40))
    asked = engine.statistics().submitted
    engine.faults.arm("step", "nan", at=2)
    broken, whole = await driver.run(request(driver.subject.prompt(1), 40), request(driver.subject.prompt(2), 40))
    assert broken.finish is FinishReason.ERROR
    assert whole.token_ids == undisturbed.token_ids
    assert engine.statistics().submitted == asked + 3
    await driver.empty()


async def test_errors_are_answered_by_one_question_at_a_time() -> None:
    """After an error, the engine must answer the golden (fixed) request again. If more errors occur meanwhile, only one
    more golden request follows, however many errors there are."""
    engine, driver = await subject()
    asked = engine.statistics().submitted
    for at in (1, 2, 3, 4):
        engine.faults.arm("step", "nan", at=at)
    await driver.run(*(request(driver.subject.prompt(i), 30, priority=-(1 << 40)) for i in range(4)))
    await driver.run(request(driver.subject.prompt(9), 30))
    assert engine.statistics().submitted == asked + 5 + 2


@pytest.mark.parametrize("fault", ["wrong", "nan"])
async def test_a_wrong_answer_is_sickness(fault: str) -> None:
    """After an error, the engine must answer the golden (fixed) request again. If this answer is wrong or has NaN,
    EngineCorrupt is raised, and the message names the node."""
    engine, driver = await subject()
    engine.faults.arm("step", fault, at=0)
    engine.faults.arm("step", "nan", at=3)
    requests = [request(driver.subject.prompt(number), 30, priority=number) for number in range(3)]
    with pytest.raises(EngineCorrupt, match="on node n1 is sick"):
        await driver.run(*requests)


async def test_an_engine_that_loses_emitted_tokens_does_not_start() -> None:
    """Starting an engine raises EngineCorrupt if the engine drops emitted tokens of a resumed request."""

    class Forgetful(SimEngine):
        async def submit(self, request: EngineRequest) -> None:
            plain = [*request.prompt_token_ids, *request.emitted_token_ids[1:]]
            await super().submit(EngineRequest(request.request_id, plain, request.sampling))

    with pytest.raises(EngineCorrupt, match="continued, its answer"):
        await CheckedEngine(Forgetful(SMALL, VirtualClock())).start()


class Apart(SimEngine):
    """An engine whose resumed requests continue with different tokens if they have a seed."""

    def __init__(self) -> None:
        super().__init__(SMALL, VirtualClock())
        self._apart: set[str] = set()

    async def start(self) -> EngineInfo:
        return dataclasses.replace(await super().start(), capabilities=("chat", RESUME_EXACT))

    async def submit(self, request: EngineRequest) -> None:
        await super().submit(request)
        if request.emitted_token_ids and request.sampling.is_seeded:
            self._apart.add(request.request_id)

    async def step(self) -> Sequence[TokenOutput]:
        outputs = await super().step()
        for position in (
            position for output in outputs if output.request_id in self._apart for position in output.logprobs or ()
        ):
            position.token_ids[0] += 1  # type: ignore[index]
        return outputs


@pytest.mark.parametrize("word", [RESUME_STATE, RESUME_PLAIN])
async def test_no_check_makes_a_word_better(word: str) -> None:
    """The golden check never improves the resume capability that an engine reports."""

    class Modest(SimEngine):
        async def start(self) -> EngineInfo:
            return dataclasses.replace(await super().start(), capabilities=(word,))

    examined = CheckedEngine(Modest(SMALL, VirtualClock()))
    assert (await examined.start()).capabilities == (word,)
    assert not examined.downgrade_reason


async def test_an_engine_whose_seeded_calls_part_is_not_exact() -> None:
    """If a resume changes an engine's tokens for a request with a seed, the engine still counts as healthy.

    The engine then reports the capability `resume:state`, and keeps its other capabilities.
    """
    examined = CheckedEngine(Apart())
    assert (await examined.start()).capabilities == ("chat", RESUME_STATE)
    assert examined.downgrade_reason == "a seeded request resumed after 2 tokens continued with different tokens"


async def test_an_engine_that_goes_on_with_no_seed_shows_nothing_by_them() -> None:
    """If an engine refuses to resume requests with a seed, the golden check decides from the greedy requests alone
    whether the engine keeps the capability RESUME_EXACT."""

    class Refusing(SimEngine):
        async def submit(self, request: EngineRequest) -> None:
            if request.emitted_token_ids and request.sampling.is_seeded:
                raise EngineRefused("RESUME_UNSUPPORTED", "seed: cannot go on", "seed")
            await super().submit(request)

    examined = CheckedEngine(Refusing(SMALL, VirtualClock()))
    assert RESUME_EXACT in (await examined.start()).capabilities
    assert not examined.downgrade_reason


class Crowded(SimEngine):
    """An engine whose log probabilities are moved by `shift` while it has more than `most` requests, or while a request
    has cached tokens if `cached`."""

    def __init__(self, shift: float, *, most: int = 1000, cached: bool = False) -> None:
        super().__init__(SMALL, VirtualClock())
        self._shift, self._most, self._cached = shift, most, cached
        self._hits: set[str] = set()

    async def start(self) -> EngineInfo:
        return dataclasses.replace(await super().start(), capabilities=(RESUME_EXACT,))

    async def step(self) -> Sequence[TokenOutput]:
        load, outputs = self.load(), await super().step()
        for output in outputs:
            if self._cached and output.cached_tokens:
                self._hits.add(output.request_id)
            if load.running + load.waiting > self._most or output.request_id in self._hits:
                for position in output.logprobs or ():
                    position.logprobs[:] = [value - self._shift for value in position.logprobs]  # type: ignore[index]
        return outputs


@pytest.mark.parametrize("fault", [{"most": 3}, {"cached": True}])
async def test_an_answer_that_depends_on_the_batch_or_the_cache_is_found(fault: dict[str, Any]) -> None:
    """At the start, an engine whose answers depend on the other requests of a step, or on cached blocks, is wrong if
    they differ clearly, and loses the capability RESUME_EXACT if they differ little."""
    with pytest.raises(EngineCorrupt, match="beside other requests"):
        await CheckedEngine(Crowded(0.1, **fault)).start()
    little = CheckedEngine(Crowded(0.005, **fault))
    assert (await little.start()).capabilities == (RESUME_STATE,)
    assert "beside other requests" in little.downgrade_reason
    same = CheckedEngine(Crowded(0.0, **fault))
    assert (await same.start()).capabilities == (RESUME_EXACT,)
    assert not same.downgrade_reason


@pytest.mark.parametrize("most", [0, 2, 7])
async def test_an_engine_that_gives_few_logprobs_is_examined_too(most: int) -> None:
    """If an engine allows only few log probabilities (max_logprobs), the golden check requests no more than these, and
    still detects changed values."""

    class Terse(SimEngine):
        shift = 0.0

        async def submit(self, request: EngineRequest) -> None:
            if (request.sampling.logprobs or 0) > most:
                raise EngineRefused("INVALID_FIELD", f"logprobs: must be in [0, {most}]", "logprobs")
            await super().submit(request)

        async def step(self) -> Sequence[TokenOutput]:
            outputs = await super().step()
            for position in (position for output in outputs for position in output.logprobs or ()):
                position.logprobs[:] = [value - self.shift for value in position.logprobs]  # type: ignore[index]
            return outputs

    engine = Terse(SMALL, VirtualClock())
    driver = Driver(Subject(examined := CheckedEngine(engine), await examined.start(), 100, 900, deadline_s=5.0))
    engine.faults.arm("step", "nan")
    await driver.run(*(request(driver.subject.prompt(number), 30) for number in range(2)))
    engine.shift = 0.1
    engine.faults.arm("step", "nan", at=2)
    with pytest.raises(EngineCorrupt):
        await driver.run(*(request(driver.subject.prompt(number), 30) for number in range(2, 4)))


@pytest.mark.parametrize("length", [2, 8, 20, 4096])
@pytest.mark.parametrize("block", [16, 128, 9000])
async def test_the_question_fits_every_engine(length: int, block: int) -> None:
    """The golden prompts and their answers fit into any context length. Their tokens are within the vocabulary. Where
    there is room, one prompt is longer than two blocks."""
    info = EngineInfo("sim", "sim", "1", block, 64, 4, 64, length, 9)
    for golden, bound in ((SHORT, 20), (Golden(prompt_tokens=(long := long_prompt_tokens(info))), 4104)):
        question = golden_request(info, "1", golden)
        assert question.request_id.startswith(PREFIX)
        assert 2 <= len(question.prompt_token_ids) + question.sampling.max_tokens <= min(length, bound)
        assert all(0 <= token < 9 for token in question.prompt_token_ids)
    assert PROMPT_TOKENS + ANSWER_TOKENS == 20
    assert long > min(2 * block, length - 9, 4095)


def softmax(logits: list[float]) -> list[float]:
    """Return the log probabilities of logits."""
    top = max(logits)
    total = math.log(sum(math.exp(logit - top) for logit in logits)) + top
    return [logit - total for logit in logits]


def greedy(logprobs: list[float], top: int) -> PositionLogprobs:
    """Return the log probabilities of one position whose token is the most likely one. The first entry is this token;
    the `top` most likely tokens follow."""
    order = sorted(range(len(logprobs)), key=lambda token: (-logprobs[token], token))
    ids = [order[0], *order[:top]]
    return PositionLogprobs(ids, [logprobs[token] for token in ids])


logits = st.lists(st.floats(-8, 8), min_size=12, max_size=12)
noise = st.lists(st.floats(-1, 1), min_size=12, max_size=12)
tops = st.sampled_from([0, 1, 3, 5, 12])
tolerances = st.sampled_from([0.02, 0.5])


@given(st.lists(st.tuples(logits, noise), min_size=1, max_size=4), tops, tolerances)
def test_a_healthy_engine_is_never_called_sick(
    given_values: list[tuple[list[float], list[float]]], top: int, tolerance: float
) -> None:
    """Log probabilities that differ within the tolerance pass the check, even if another token becomes the greedy
    token.

    Positions after a different token are not compared.
    """
    reference, answer, same = GoldenAnswer(), GoldenAnswer(), True
    for values, moves in given_values:
        expected = softmax(values)
        if same:
            actual = [value + 0.999 * tolerance * move for value, move in zip(expected, moves, strict=True)]
        else:
            actual = softmax(moves)
        reference.positions.append(greedy(expected, top))
        answer.positions.append(greedy(actual, top))
        same = same and reference.token_ids == answer.token_ids
    assert not why_wrong(reference, answer, tolerance)
    assert not why_wrong(answer, answer, tolerance)


@given(logits, noise, st.integers(0, 11), tolerances)
def test_an_engine_beyond_the_tolerance_is_called_sick(
    values: list[float], moves: list[float], token: int, tolerance: float
) -> None:
    """The check compares two answers that both list all log probabilities. It fails if one value differs by more than
    the tolerance, whichever token is the most likely."""
    expected = softmax(values)
    actual = [value + 0.999 * tolerance * move for value, move in zip(expected, moves, strict=True)]
    actual[token] = expected[token] + 1.01 * tolerance
    reference, answer = GoldenAnswer([greedy(expected, 12)]), GoldenAnswer([greedy(actual, 12)])
    assert why_wrong(reference, answer, tolerance)
    assert why_wrong(answer, reference, tolerance)


@given(logits, st.integers(1, 4), tolerances)
def test_another_model_is_called_sick(values: list[float], top: int, tolerance: float) -> None:
    """An engine's answer is wrong if its most likely token differs from the reference's most likely token, and the
    reference gives the engine's token a clearly lower probability or does not list it."""
    right = sorted(softmax(values), reverse=True)
    right[0] += 2.1 * tolerance
    reference = GoldenAnswer([greedy(right, top + 1)])
    wrong = GoldenAnswer([PositionLogprobs([11], [right[0]])])
    assert why_wrong(reference, wrong, tolerance) == "token 0 is 11 instead of 0"


@given(logits, logits, st.integers(0, 11), st.integers(0, 11), tolerances)
def test_more_values_never_hide_what_fewer_prove(
    values: list[float], others: list[float], fewer: int, more: int, tolerance: float
) -> None:
    """If a short list of log probabilities proves an answer wrong, a longer list proves it, too."""
    fewer, more = sorted((fewer, more))

    def verdict(top: int) -> str:
        return why_wrong(
            GoldenAnswer([greedy(softmax(values), top)]), GoldenAnswer([greedy(softmax(others), top)]), tolerance
        )

    assert verdict(more) or not verdict(fewer)


def test_a_token_outside_the_list_is_undecided() -> None:
    """The reference answer lists only the most likely tokens. An engine may answer with a token that is not in this
    list. The answer counts as wrong only if the token's log probability is too high or too low for such a token."""
    reference = GoldenAnswer([PositionLogprobs([1, 1, 2, 3], [-2.0, -2.0, -2.2, -2.4])])

    def answer(*values: float) -> GoldenAnswer:
        return GoldenAnswer([PositionLogprobs([9, 9, 8, 7], [values[0], *values])])

    assert not why_wrong(reference, answer(-2.1, -2.2, -2.3), 0.5)
    assert why_wrong(reference, answer(-1.8, -2.2, -2.6), 0.5) == "token 0 is 9 instead of 1", "above what 9 can have"
    assert why_wrong(reference, answer(-2.6, -2.7, -2.8), 0.5) == "token 0 is 9 instead of 1", "below what 1 has"


def test_a_tie_may_end_either_way() -> None:
    """If a token differs from the reference's token but is equally likely in the reference, it is accepted, and
    later positions are not compared.

    A token that is clearly less likely in the reference is wrong. So is a token to which the engine itself
    gives a lower probability than to another token.
    """
    reference = GoldenAnswer([PositionLogprobs([1, 1, 2, 3], [-0.70, -0.70, -0.72, -3.0])] * 2)

    def answer(token: int, value: float) -> GoldenAnswer:
        return GoldenAnswer([PositionLogprobs([token], [value]), PositionLogprobs([99], [-1.0])])

    assert not why_wrong(reference, answer(2, -0.71), 0.02)
    assert why_wrong(reference, answer(3, -0.7), 0.02) == "token 0 is 3 instead of 1"
    assert why_wrong(reference, answer(7, -0.7), 0.02) == "token 0 is 7 instead of 1"
    assert why_wrong(reference, answer(1, math.nan), 0.02) == "token 0 has the log probability nan"
    assert why_wrong(reference, answer(1, -0.8), 0.02) == "token 0 has the log probability -0.800 instead of -0.700"
    assert "1 tokens instead of 2" in why_wrong(reference, GoldenAnswer(reference.positions[:1]), 0.02)
    sampled_badly = GoldenAnswer([PositionLogprobs([3, 1, 2, 3], [-3.0, -0.70, -0.72, -3.0])] * 2)
    assert why_wrong(reference, sampled_badly, 0.02) == "token 0 is 3, which is not the likeliest"
