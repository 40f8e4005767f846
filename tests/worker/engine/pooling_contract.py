"""The contract of cluster.api.ports.Engine for pooling models, as tests for any engine.

A test class inherits PoolingContract and has a fixture `engine` that returns a `Subject` of a started pooling model.
The tests share the engine and leave it empty.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest

from cluster.api.outcomes import Outcome
from cluster.api.pooling import PoolingInfo, PoolingOptions, PoolingTask, pooling_tasks
from cluster.api.ports import EngineRefused
from cluster.api.types import EngineRequest, FinishReason, Sampling, weakest_resume_capability
from cluster.worker.engine.golden_vectors import floats
from tests.worker.engine.contract import Answer, Driver, Subject

_serial = itertools.count()
UNUSED = Sampling(max_tokens=1)
"""Sampling parameters of pooling requests, which no engine reads."""
NEAR = 1e-5
"""Greatest distance between two computations of one vector in float32."""


def info_of(subject: Subject) -> PoolingInfo:
    """Return the PoolingInfo of the subject's model."""
    assert subject.info.pooling is not None
    return subject.info.pooling


def pool(
    ids: Sequence[int],
    task: PoolingTask,
    dimensions: int | None = None,
    second_text_at: int = 0,
    request_id: str = "",
    priority: int = 0,
    emitted: Sequence[int] = (),
) -> EngineRequest:
    """Return a pooling request. Without `request_id`, it gets a unique id."""
    return EngineRequest(
        request_id or f"pool-{next(_serial)}",
        ids,
        UNUSED,
        emitted_token_ids=emitted,
        priority=priority,
        pooling=PoolingOptions(task, dimensions, second_text_at),
    )


def vector(answer: Answer) -> list[float]:
    """Return the vector of a successful request. Check that the request has exactly one output, without tokens."""
    (output,) = answer.outputs
    assert (output.finish, list(output.token_ids), output.message) == (FinishReason.STOP, [], "")
    assert output.vector is not None
    return list(floats(output.vector))


def scaled(values: Sequence[float], dimensions: int) -> list[float]:
    """Return the first `dimensions` values of a vector, scaled to length 1."""
    length = math.hypot(*values[:dimensions])
    return [value / length for value in values[:dimensions]]


async def refuse(driver: Driver, request: EngineRequest, field: str, outcome: Outcome) -> str:
    """Submit a request that the engine must refuse with this field and outcome; return the message."""
    with pytest.raises(EngineRefused) as refused:
        await driver.submit(request)
    assert (refused.value.field, refused.value.reason) == (field, outcome.name)
    return refused.value.message


class PoolingContract:
    """Tests of the contract of pooling models."""

    @pytest.fixture
    def engine(self) -> Subject:
        """The engine to test. Test classes override it."""
        raise NotImplementedError

    @pytest.fixture
    def driver(self, engine: Subject) -> Driver:
        """A driver of the engine."""
        return Driver(engine)

    @pytest.fixture
    def task(self, engine: Subject) -> PoolingTask:
        """The first task of the model."""
        return info_of(engine).tasks[0]

    def test_names_its_tasks(self, engine: Subject) -> None:
        """The engine's capabilities name its pooling tasks, and say that it cannot resume requests. Its KV cache has
        room for the longest text and for a full step."""
        info = info_of(engine)
        assert pooling_tasks(engine.info.capabilities) == info.tasks
        assert not weakest_resume_capability(engine.info.capabilities)
        assert engine.info.kv_tokens >= engine.info.max_model_len
        assert engine.info.kv_tokens >= engine.info.max_num_batched_tokens

    async def test_one_output_with_counts(self, driver: Driver, task: PoolingTask) -> None:
        """A request has one output, with the vector and the length of the prompt. The engine is idle afterwards."""
        ids = driver.subject.prompt(1, 7)
        (answer,) = await driver.run(pool(ids, task))
        values = vector(answer)
        assert (answer.outputs[0].prompt_tokens, answer.outputs[0].cached_tokens) == (7, 0)
        if task is PoolingTask.EMBED:
            assert len(values) == info_of(driver.subject).dimensions
            assert math.hypot(*values) == pytest.approx(1.0, abs=NEAR)
        else:
            assert len(values) == 1
            assert 0.0 < values[0] < 1.0
        load = driver.engine.load()
        assert (load.running, load.waiting, load.prefill_tokens) == (0, 0, 0)

    async def test_vectors_do_not_depend_on_the_batch(self, driver: Driver, task: PoolingTask) -> None:
        """A text has the same vector in a batch as alone, and different texts have different vectors."""
        prompts = [driver.subject.prompt(seed, 3 + 5 * seed) for seed in range(6)]
        together = [vector(answer) for answer in await driver.run(*(pool(ids, task) for ids in prompts))]
        for ids, expected in zip(prompts, together, strict=True):
            (alone,) = await driver.run(pool(ids, task))
            assert math.dist(vector(alone), expected) < NEAR
        assert all(math.dist(one, other) > 10 * NEAR for one, other in itertools.combinations(together, 2))

    async def test_more_requests_than_slots(self, driver: Driver, task: PoolingTask) -> None:
        """If there are more requests than slots, some wait in the engine, and all get their vectors."""
        prompts = [driver.subject.prompt(seed) for seed in range(driver.subject.info.max_num_seqs + 3)]
        answers = await driver.run(*(pool(ids, task) for ids in prompts))
        assert len({tuple(vector(answer)) for answer in answers}) == len(prompts)

    async def test_a_text_may_fill_the_context(self, driver: Driver, task: PoolingTask) -> None:
        """A text that fills the whole context gets a vector, since pooling generates no token. A longer text is
        refused."""
        longest = driver.subject.info.max_model_len
        (answer,) = await driver.run(pool(driver.subject.prompt(3, longest), task))
        assert answer.outputs[0].prompt_tokens == longest
        assert vector(answer)
        too_long = pool(driver.subject.prompt(3, longest + 1), task)
        message = await refuse(driver, too_long, "prompt_token_ids", Outcome.CONTEXT_LENGTH_EXCEEDED)
        assert str(longest) in message

    async def test_wrong_ids_are_refused(self, driver: Driver, task: PoolingTask) -> None:
        """A request is refused if its prompt has no ids, if an id is outside the vocabulary, or if it has emitted
        tokens. Another request still gets its vector."""
        good = pool(driver.subject.prompt(4), task)
        await driver.submit(good)
        await refuse(driver, pool((), task), "prompt_token_ids", Outcome.INVALID_FIELD)
        beyond = driver.subject.info.vocab_size
        await refuse(driver, pool((5, beyond), task), "prompt_token_ids", Outcome.INVALID_FIELD)
        await refuse(driver, pool((5, 6), task, emitted=(7,)), "emitted_token_ids", Outcome.INVALID_FIELD)
        await driver.until(lambda: driver.answers[good.request_id].finish is not None)
        assert vector(driver.answers[good.request_id])

    async def test_requests_of_another_kind_are_refused(self, driver: Driver, task: PoolingTask) -> None:
        """A request for generated tokens is refused, and so is a task that the model lacks. Other requests run on."""
        good = pool(driver.subject.prompt(5), task)
        await driver.submit(good)
        generation = EngineRequest("tokens", driver.subject.prompt(5), Sampling(max_tokens=4))
        message = await refuse(driver, generation, "model", Outcome.UNSUPPORTED_FEATURE)
        assert "name a model that generates" in message
        for other in set(PoolingTask) - set(info_of(driver.subject).tasks):
            wrong = pool(driver.subject.prompt(5), other)
            message = await refuse(driver, wrong, "model", Outcome.UNSUPPORTED_FEATURE)
            assert other.value in message
        await driver.until(lambda: driver.answers[good.request_id].finish is not None)
        assert vector(driver.answers[good.request_id])

    async def test_allowed_dimensions(self, driver: Driver) -> None:
        """If the model allows a smaller number of dimensions, a vector with this number is the beginning of the full
        vector, scaled to the norm 1. The full number of dimensions may be requested too. A score has one dimension."""
        info = info_of(driver.subject)
        ids = driver.subject.prompt(6, 9)
        if PoolingTask.EMBED not in info.tasks:
            answers = await driver.run(*(pool(ids, PoolingTask.SCORE, length) for length in (None, 1)))
            assert vector(answers[0]) == pytest.approx(vector(answers[1]), abs=NEAR)
            return
        lengths = [1, 2, info.dimensions - 1] if info.any_shorter else list(info.shorter_dimensions)
        assert lengths, "the model under test must declare shorter lengths"
        requests = [pool(ids, PoolingTask.EMBED, length) for length in (None, info.dimensions, *lengths)]
        whole, named, *shorter = [vector(answer) for answer in await driver.run(*requests)]
        assert named == pytest.approx(whole, abs=NEAR)
        for length, values in zip(lengths, shorter, strict=True):
            assert len(values) == length
            assert values == pytest.approx(scaled(whole, length), abs=NEAR)

    async def test_other_dimensions_are_refused(self, driver: Driver, task: PoolingTask) -> None:
        """A request is refused if it asks for a vector length that the model does not allow."""
        for length in (0, -1, info_of(driver.subject).dimensions + 1, 2**31 - 1):
            wrong = pool(driver.subject.prompt(7), task, length)
            await refuse(driver, wrong, "dimensions", Outcome.INVALID_FIELD)

    async def test_a_second_text_outside_the_prompt_is_refused(self, driver: Driver, task: PoolingTask) -> None:
        """A second text that does not begin inside the prompt is refused."""
        for at in (5, 6, 2**32 - 1):
            await refuse(
                driver, pool(driver.subject.prompt(8), task, None, at), "second_text_at", Outcome.INVALID_FIELD
            )

    async def test_an_aborted_request_has_no_output(self, driver: Driver, task: PoolingTask) -> None:
        """An aborted request has no output. While a request runs, its id is refused for another request."""
        aborted, kept = (pool(driver.subject.prompt(9), task) for _ in range(2))
        await driver.submit(aborted)
        again = pool(driver.subject.prompt(9), task, request_id=aborted.request_id)
        with pytest.raises(EngineRefused, match="request_id"):
            await driver.engine.submit(again)
        await driver.abort([aborted.request_id])
        (answer,) = await driver.run(kept)
        assert vector(answer)
        assert driver.engine.load().running == 0

    async def test_all_tasks_in_one_batch(self, driver: Driver) -> None:
        """Requests for all tasks of the model run in one batch, and each gets the result of its task."""
        tasks = info_of(driver.subject).tasks
        requests = [pool(driver.subject.prompt(seed), tasks[seed % len(tasks)]) for seed in range(6)]
        lengths = {PoolingTask.EMBED: info_of(driver.subject).dimensions, PoolingTask.SCORE: 1}
        for request, answer in zip(requests, await driver.run(*requests), strict=True):
            assert request.pooling is not None
            assert len(vector(answer)) == lengths[request.pooling.task]
