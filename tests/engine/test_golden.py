"""The golden prompt: what makes an engine sick, what does not, and that callers see nothing of it."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.ports import EngineRefused, EngineSick
from cluster.api.types import EngineInfo, EngineRequest, FinishReason, PositionLogprobs
from cluster.engine.golden import ANSWER_TOKENS, PREFIX, PROMPT_TOKENS, Answer, Examined, golden_request, why_wrong
from cluster.engine.sim import SimConfig, SimEngine, VirtualClock
from tests.engine.contract import Driver, EngineContract, Subject, request

SMALL = SimConfig(vocab=1000, token_lo=100, token_hi=900, eos=2, max_model_len=256, max_num_seqs=4, kv_blocks=64)


async def subject() -> tuple[SimEngine, Driver]:
    """A simulated engine that is well, and the driver of the examined one around it."""
    engine = SimEngine(SMALL, VirtualClock())
    examined = Examined(engine, node="n1")
    return engine, Driver(Subject(examined, await examined.start(), 100, 900, deadline_s=5.0))


class TestContract(EngineContract):
    """An examined engine is an engine."""

    @pytest.fixture
    async def engine(self) -> AsyncIterator[Subject]:
        """A simulated one within."""
        engine, driver = await subject()
        yield driver.subject
        assert engine.statistics().kv_used_blocks == 0


async def test_an_error_of_a_well_engine_changes_nothing() -> None:
    """A request that ends in an error makes the golden prompt be asked, and all others go on with their tokens."""
    engine, driver = await subject()
    (undisturbed,) = await driver.run(request(driver.subject.prompt(2), 40))
    asked = engine.statistics().submitted
    engine.fail("step", "nan", at=2)
    broken, whole = await driver.run(request(driver.subject.prompt(1), 40), request(driver.subject.prompt(2), 40))
    assert broken.finish is FinishReason.ERROR
    assert whole.token_ids == undisturbed.token_ids
    assert engine.statistics().submitted == asked + 3
    await driver.empty()


async def test_errors_are_answered_by_one_question_at_a_time() -> None:
    """However many requests end in errors meanwhile, one golden prompt is under way, and one more follows."""
    engine, driver = await subject()
    asked = engine.statistics().submitted
    for at in (1, 2, 3, 4):
        engine.fail("step", "nan", at=at)
    await driver.run(*(request(driver.subject.prompt(i), 30, priority=-(1 << 40)) for i in range(4)))
    await driver.run(request(driver.subject.prompt(9), 30))
    assert engine.statistics().submitted == asked + 5 + 2


@pytest.mark.parametrize("fault", ["wrong", "nan"])
async def test_a_wrong_answer_is_sickness(fault: str) -> None:
    """An engine whose golden answer is wrong, or has NaN, after an error raises EngineSick with its node."""
    engine, driver = await subject()
    engine.fail("step", fault, at=0)
    engine.fail("step", "nan", at=3)
    requests = [request(driver.subject.prompt(number), 30, priority=number) for number in range(3)]
    with pytest.raises(EngineSick, match="on node n1 is sick"):
        await driver.run(*requests)


async def test_an_engine_that_loses_emitted_tokens_does_not_start() -> None:
    """One that says it continues exactly, and starts anew instead, is found out before it takes a call."""

    class Forgetful(SimEngine):
        async def submit(self, request: EngineRequest) -> None:
            plain = [*request.prompt_token_ids, *request.emitted_token_ids[1:]]
            await super().submit(EngineRequest(request.request_id, plain, request.sampling))

    with pytest.raises(EngineSick, match="continued, its answer"):
        await Examined(Forgetful(SMALL, VirtualClock())).start()


async def test_an_engine_without_top_logprobs_is_examined_too() -> None:
    """Where max_logprobs is 0 the sampled tokens' own values are compared."""

    class Terse(SimEngine):
        async def submit(self, request: EngineRequest) -> None:
            if request.sampling.logprobs:
                raise EngineRefused("INVALID_FIELD", "logprobs: must be in [0, 0]", "logprobs")
            await super().submit(request)

    engine = Terse(SMALL, VirtualClock())
    driver = Driver(Subject(examined := Examined(engine), await examined.start(), 100, 900, deadline_s=5.0))
    engine.fail("step", "wrong")
    engine.fail("step", "nan", at=2)
    with pytest.raises(EngineSick):
        await driver.run(*(request(driver.subject.prompt(number), 30) for number in range(2)))


@pytest.mark.parametrize("length", [2, 8, 20, 4096])
async def test_the_question_fits_every_engine(length: int) -> None:
    """Whatever the context, prompt and answer fit into it and stay within the vocabulary."""
    info = EngineInfo("sim", "sim", "1", 16, 64, 4, 64, length, 9)
    question = golden_request(info, "1")
    assert question.request_id.startswith(PREFIX)
    assert 2 <= len(question.prompt_token_ids) + question.sampling.max_tokens <= min(length, 20)
    assert all(0 <= token < 9 for token in question.prompt_token_ids)
    assert PROMPT_TOKENS + ANSWER_TOKENS == 20


values = st.floats(-20, 0)


@given(st.lists(values, min_size=1, max_size=6), st.floats(-0.99, 0.99), st.floats(0.01, 0.5))
def test_noise_within_the_tolerance_is_right_and_beyond_it_wrong(
    given_values: list[float], noise: float, tolerance: float
) -> None:
    """Log probabilities may move by the tolerance, and by no more."""
    reference = Answer([PositionLogprobs([5, 5], [value, value]) for value in given_values])

    def moved(by: float) -> Answer:
        return Answer([PositionLogprobs([5, 5], [value + by, value + by]) for value in given_values])

    assert not why_wrong(reference, moved(noise * tolerance), tolerance)
    assert why_wrong(reference, moved(1.01 * tolerance + 1e-9), tolerance)


def test_a_tie_may_end_either_way() -> None:
    """A token that was as likely is right, whatever follows it; a clearly less likely or unknown one is wrong."""
    reference = Answer([PositionLogprobs([1, 1, 2, 3], [-0.70, -0.70, -0.72, -3.0])] * 2)

    def answer(token: int, value: float) -> Answer:
        return Answer([PositionLogprobs([token], [value]), PositionLogprobs([99], [-1.0])])

    assert not why_wrong(reference, answer(2, -0.71), 0.02)
    assert why_wrong(reference, answer(3, -0.7), 0.02) == "token 0 is 3 instead of 1"
    assert why_wrong(reference, answer(7, -0.7), 0.02) == "token 0 is 7 instead of 1"
    assert why_wrong(reference, answer(1, math.nan), 0.02) == "token 0 has the log probability nan"
    assert "1 tokens instead of 2" in why_wrong(reference, Answer(reference.positions[:1]), 0.02)
