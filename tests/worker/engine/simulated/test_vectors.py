"""The simulated engine as a pooling model: its vectors, and the contract of pooling models."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator

import pytest

from cluster.api.pooling import MAX_DIMENSIONS, PoolingInfo, PoolingTask
from cluster.api.ports import EngineCorrupt, EngineRefused
from cluster.api.types import EngineInfo, EngineRequest, FinishReason, Sampling
from cluster.worker.engine.golden_check import CheckedEngine
from cluster.worker.engine.golden_vectors import floats, why_vector_wrong
from cluster.worker.engine.simulated.config import SimConfig
from cluster.worker.engine.simulated.engine import SimEngine, VirtualClock
from tests.worker.engine.contract import Driver, Subject
from tests.worker.engine.pooling_contract import PoolingContract, pool, vector

SMALL = SimConfig(
    vocab=1000,
    token_lo=100,
    token_hi=900,
    eos=2,
    max_model_len=256,
    max_num_seqs=4,
    max_num_batched_tokens=512,
    kv_blocks=64,
    embed_dimensions=24,
    any_dimensions=1,
    scores=1,
)


async def subject(config: SimConfig = SMALL) -> tuple[SimEngine, Driver]:
    """Return a simulated engine in virtual time, and a Driver that runs requests on it. The Driver's requests pass
    through CheckedEngine, which checks the engine's answers."""
    engine = SimEngine(config, VirtualClock())
    checked = CheckedEngine(engine, node="n1")
    return engine, Driver(Subject(checked, await checked.start(), 100, 900, deadline_s=5.0))


class TestContract(PoolingContract):
    """The contract of pooling models for an engine that computes both vectors and scores."""

    @pytest.fixture
    async def engine(self) -> AsyncIterator[Subject]:
        """A small simulated engine in virtual time."""
        engine, driver = await subject()
        yield driver.subject
        assert engine.statistics().kv_used_blocks == 0


async def test_vectors_are_the_same_on_every_engine() -> None:
    """Two engines give equal vectors for equal tokens with any cache salt. Another seed gives other vectors."""
    ids, vectors = (101, 102, 103), []
    for seed, salt in ((0, ""), (0, "tenant"), (1, "")):
        _, driver = await subject(SimConfig(vocab=1000, token_hi=900, max_model_len=64, embed_dimensions=8, seed=seed))
        request = pool(ids, PoolingTask.EMBED)
        salted = EngineRequest("r", ids, request.sampling, cache_salt=salt, pooling=request.pooling)
        vectors.append(vector((await driver.run(salted))[0]))
    assert vectors[0] == vectors[1] != vectors[2]


async def test_a_score_depends_on_where_the_second_text_begins() -> None:
    """A score is computed for two texts whose tokens are joined. The simulated score changes with the position at which
    the second text begins. So a test can detect that this position was lost."""
    _, driver = await subject()
    ids = driver.subject.prompt(1, 6)
    answers = await driver.run(*(pool(ids, PoolingTask.SCORE, None, at) for at in (0, 2, 3, 2)))
    first, second, third, again = (vector(answer)[0] for answer in answers)
    assert second == again
    assert len({first, second, third}) == 3


async def test_an_error_of_one_text_is_no_vector() -> None:
    """A request whose vector has the value NaN ends with an error and without a vector. Other requests get their
    vectors, in the same step and afterwards."""
    engine, driver = await subject()
    engine.faults.arm("step", "nan", at=1)
    broken, whole = await driver.run(*(pool(driver.subject.prompt(i), PoolingTask.EMBED) for i in (1, 2)))
    assert [(output.finish, output.vector) for output in broken.outputs] == [(FinishReason.ERROR, None)]
    assert vector(whole)
    await driver.run(pool(driver.subject.prompt(3), PoolingTask.EMBED))


async def test_a_wrong_vector_is_sickness() -> None:
    """After an engine error, the golden request (a request with a known answer) runs. If it gives a wrong vector,
    EngineCorrupt is raised, and the message names the node."""
    engine, driver = await subject()
    engine.faults.arm("step", "nan", at=1)
    engine.faults.arm("step", "wrong", at=0)

    async def run() -> None:
        for seed in range(3):
            await driver.run(pool(driver.subject.prompt(seed), PoolingTask.EMBED))

    with pytest.raises(EngineCorrupt, match="on node n1 is sick"):
        await run()


def test_a_vector_of_another_length_than_promised_is_wrong() -> None:
    """The golden vector has the length that the gateways see. An engine that leaves out a projection gives another
    one, and its start fails."""
    info = EngineInfo("float32", "sim", "1", 16, 10, 1, 64, 64, 1000, pooling=PoolingInfo((PoolingTask.EMBED,), 64))
    vector = b"\0\0\x80\x3f" * 128
    assert why_vector_wrong(vector, vector, info) == "a vector of 128 numbers, and the model's settings promise 64"
    assert not why_vector_wrong(vector[:256], vector[:256], info)


async def test_a_generating_engine_refuses_pooling() -> None:
    """An engine without vectors refuses a pooling request with the name of the field, and keeps serving."""
    engine = SimEngine(SimConfig(vocab=1000, token_lo=100, token_hi=900, max_model_len=256), VirtualClock())
    info = await engine.start()
    assert info.pooling is None
    with pytest.raises(EngineRefused, match="name a pooling model") as refused:
        await engine.submit(pool((101,), PoolingTask.EMBED))
    assert refused.value.field == "model"
    await engine.submit(EngineRequest("r", (101,), Sampling(max_tokens=1)))
    assert [output.finish for output in await engine.step()] == [FinishReason.LENGTH]


def test_the_source_names_the_vectors() -> None:
    """The URL of a simulated model sets the length of its vectors. Another length changes the model's digest. The error
    for a wrong length names the parameter."""
    config = SimConfig.from_source("sim:///?embed_dimensions=32&any_dimensions=1")
    assert (config.embed_dimensions, config.any_dimensions, config.scores) == (32, 1, 0)
    assert config.weight_digest != SimConfig.from_source("sim:///").weight_digest
    for query in (f"embed_dimensions={MAX_DIMENSIONS + 1}", "embed_dimensions=-1", "scores=2", "any_dimensions=2"):
        with pytest.raises(ValueError, match=query.partition("=")[0]):
            SimConfig.from_source(f"sim:///?{query}")


def test_floats_read_what_engines_write() -> None:
    """A vector's bytes are little-endian float32."""
    assert list(floats(b"\x00\x00\x80\x3f\x00\x00\x00\xc0")) == [1.0, -2.0]
    assert math.isnan(floats(b"\x00\x00\xc0\x7f")[0])
