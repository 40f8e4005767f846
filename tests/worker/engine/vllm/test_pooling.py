"""Tests of pooling models on vLLM: they fulfil the engine contract for pooling, and their results equal those of
transformers.

A real embedding model and a tiny cross-encoder run on the fast path (vLLM's engine core, called directly). A
generating model that is used for embeddings runs on vLLM's AsyncLLM.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.api.outcomes import Outcome
from cluster.api.pooling import PoolingInfo, PoolingTask
from cluster.api.types import KV_EVENTS, ModelSpec
from cluster.worker.engine.golden_check import CheckedEngine
from cluster.worker.engine.vllm.engine import VllmEngine
from cluster.worker.weights.tokenizer_bundle import build_bundle
from tests.support.pooling_models import build_cross_encoder, minilm
from tests.worker.engine.conftest import DEADLINE_S
from tests.worker.engine.contract import Driver, Subject
from tests.worker.engine.pooling_contract import NEAR, PoolingContract, pool, refuse, scaled, vector

pytestmark = pytest.mark.engine

TEXTS = (
    "",
    "A cat sleeps on the mat.",
    "The kitten is napping on the rug.",
    "Interest rates rose by half a percent.",
    "ÄÖÜ, naïve café, 数学",
    "river " * 120,
)
LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 512}


async def started(folder: Path, *, fast: bool, **engine: object) -> AsyncIterator[Subject]:
    """Start an engine inside a CheckedEngine, which runs the golden check, and yield it as a Subject."""
    spec = ModelSpec("pooling", "unused", dtype="float32", engine={**LIMITS, **engine})
    checked = CheckedEngine(VllmEngine(spec, folder, prefer_fastpath=fast))
    try:
        info = await checked.start()
        yield Subject(checked, info, 5, min(info.vocab_size, 900), DEADLINE_S)
    finally:
        await checked.close()


@pytest.fixture(scope="module")
def minilm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the model all-MiniLM-L6-v2."""
    return minilm(tmp_path_factory.mktemp("minilm"))


@pytest.fixture(scope="module")
async def embedder(minilm_folder: Path) -> AsyncIterator[Subject]:
    """all-MiniLM-L6-v2 on the fast path. Its configuration is overridden, so that it declares shorter vectors of 64 and
    128 numbers."""
    async for subject in started(minilm_folder, fast=True, hf_overrides={"matryoshka_dimensions": [64, 128]}):
        yield subject


@pytest.fixture(scope="module")
def cross_encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny cross-encoder."""
    return build_cross_encoder(tmp_path_factory.mktemp("cross-encoder"))


@pytest.fixture(scope="module")
async def cross_encoder(cross_encoder_folder: Path) -> AsyncIterator[Subject]:
    """The tiny cross-encoder on the fast path."""
    async for subject in started(cross_encoder_folder, fast=True):
        yield subject


class TestEmbeddings(PoolingContract):
    """The contract of pooling models, tested with the embedding model all-MiniLM-L6-v2 on the engine path
    `fastpath`."""

    @pytest.fixture
    def engine(self, embedder: Subject) -> Subject:
        """The engine that all tests share."""
        return embedder

    def test_says_what_it_is(self, engine: Subject) -> None:
        """EngineInfo has the engine path, the lengths of vectors and the maximum length of a text. The model has no KV
        cache, so the engine's capacity in KV tokens is set to the number of tokens that it computes in four steps."""
        info = engine.info
        assert info.engine_path == "fastpath"
        assert info.capabilities == ("pools:embed",)
        assert info.pooling == PoolingInfo((PoolingTask.EMBED,), 384, (64, 128))
        assert (info.max_model_len, info.max_num_seqs) == (256, 8)
        assert info.kv_tokens == 4 * 512

    async def test_vectors_equal_mean_pooling(self, driver: Driver, minilm_folder: Path) -> None:
        """A text's vector equals transformers' mean over all positions, special tokens included, scaled to length 1.
        Similar texts have similar vectors."""
        tokenizer = bundle_tokenizer(minilm_folder)
        ids = [tokenizer.encode(text).ids for text in TEXTS]
        assert ids[0] == [101, 102]
        expected = mean_pooled(minilm_folder, ids)
        got = [vector(answer) for answer in await driver.run(*(pool(each, PoolingTask.EMBED) for each in ids))]
        for one, other in zip(got, expected, strict=True):
            assert math.dist(one, other) < NEAR
        cosine = [sum(a * b for a, b in zip(got[1], other, strict=True)) for other in got[2:4]]
        assert cosine[0] > 0.5 > cosine[1]

    async def test_shorter_vectors_equal_mean_pooling(self, driver: Driver, minilm_folder: Path) -> None:
        """A shorter vector is the beginning of transformers' vector, scaled to length 1."""
        ids = bundle_tokenizer(minilm_folder).encode(TEXTS[1]).ids
        (expected,) = mean_pooled(minilm_folder, [ids])
        (answer,) = await driver.run(pool(ids, PoolingTask.EMBED, 64))
        assert math.dist(vector(answer), scaled(expected, 64)) < NEAR


class TestScores(PoolingContract):
    """The contract of pooling models, tested with a cross-encoder on the engine path `fastpath`."""

    @pytest.fixture
    def engine(self, cross_encoder: Subject) -> Subject:
        """The engine that all tests share."""
        return cross_encoder

    def test_says_what_it_is(self, engine: Subject) -> None:
        """EngineInfo has the engine path `fastpath` and the task `score`, whose result is a vector of length 1."""
        assert (engine.info.engine_path, engine.info.capabilities) == ("fastpath", ("pools:score",))
        assert engine.info.pooling == PoolingInfo((PoolingTask.SCORE,), 1)

    async def test_scores_equal_transformers(self, driver: Driver, cross_encoder_folder: Path) -> None:
        """The scores of pairs and of a single text, computed in one batch, equal the scores that transformers computes.
        The token types change the score of a pair."""
        await scores_equal_transformers(driver, cross_encoder_folder)

    async def test_a_start_of_the_second_text_alone_changes_the_score(self, driver: Driver) -> None:
        """The same token ids have a different score if the second text starts at a different position."""
        ids = driver.subject.prompt(2, 8)
        answers = await driver.run(*(pool(ids, PoolingTask.SCORE, None, at) for at in (0, 3, 5)))
        assert len({round(vector(answer)[0], 5) for answer in answers}) == 3


@pytest.fixture(scope="module")
async def decoder(llama_folder: Path) -> AsyncIterator[Subject]:
    """A tiny Llama that runs as an embedding model on the AsyncLLM path, because its catalog entry says so. Requests
    may ask for any shorter vector."""
    options: dict[str, Any] = {"block_size": 32, "kv_cache_memory_bytes": 64 << 20}
    async for subject in started(
        llama_folder, fast=False, runner="pooling", hf_overrides={"is_matryoshka": True}, **options
    ):
        yield subject


class TestDecoder(PoolingContract):
    """The contract tests of pooling models, for a text-generating model that is used as an embedding model. The engine
    runs behind AsyncLLM."""

    @pytest.fixture
    def engine(self, decoder: Subject) -> Subject:
        """The engine that all tests share."""
        return decoder

    def test_says_what_it_is(self, engine: Subject) -> None:
        """For a decoder model, EngineInfo reports the engine path `public` and a KV cache, and that a vector may have
        any shorter length."""
        assert engine.info.engine_path == "public"
        assert engine.info.pooling == PoolingInfo((PoolingTask.EMBED,), 128, any_shorter=True)
        assert engine.info.kv_tokens > 16 * engine.info.max_num_batched_tokens
        assert KV_EVENTS in engine.info.capabilities

    async def test_a_prefix_is_computed_once(self, driver: Driver) -> None:
        """For a second request with the same prefix, the prefix is in the KV cache and the vector is the same. For a
        request with another cache salt, the prefix is not in the cache: a tenant must not learn what another tenant has
        sent."""
        ids = driver.subject.prompt(11, 200)
        requests = [pool(ids, PoolingTask.EMBED) for _ in range(3)]
        requests[2] = replace(requests[2], cache_salt="other")
        answers = [(await driver.run(request))[0] for request in requests]
        assert [(answer.outputs[0].cached_tokens or 0) > 100 for answer in answers] == [False, True, False]
        first, *others = map(vector, answers)
        assert all(math.dist(first, other) < NEAR for other in others)


async def test_a_generating_engine_refuses_pooling(fast_subject: Subject) -> None:
    """A generating engine refuses a pooling request. The error names the field and the remedy."""
    driver = Driver(fast_subject)
    wrong = pool(fast_subject.prompt(1), PoolingTask.EMBED)
    assert "name a pooling model" in await refuse(driver, wrong, "model", Outcome.UNSUPPORTED_FEATURE)


def bundle_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in the model's bundle, as a gateway uses it."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(build_bundle(folder).files["tokenizer.json"].decode())


def mean_pooled(folder: Path, ids: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return transformers' hidden states of each text, averaged over its tokens and scaled to length 1."""
    import torch
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        states = [model(input_ids=torch.tensor([each])).last_hidden_state[0].mean(0) for each in ids]
    return [torch.nn.functional.normalize(state, dim=0).tolist() for state in states]


async def scores_equal_transformers(driver: Driver, folder: Path) -> None:
    """Check that the scores of three pairs and of a single text equal those of transformers. The bundle's tokenizer
    encodes the texts."""
    import torch
    from transformers import BertForSequenceClassification

    tokenizer = bundle_tokenizer(folder)
    pairs = [("why the river", "a red cat runs"), ("the old dog sleeps", "blue"), ("green", "new mountain the a cat")]
    encoded = [tokenizer.encode(*pair) for pair in pairs] + [tokenizer.encode("a cat sleeps")]
    model = BertForSequenceClassification.from_pretrained(folder, dtype=torch.float32)

    def score(ids: Sequence[int], types: Sequence[int]) -> float:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([list(ids)]), token_type_ids=torch.tensor([list(types)])).logits
        return float(torch.sigmoid(logits)[0, 0])

    expected = [score(each.ids, each.type_ids) for each in encoded]
    starts = [each.type_ids.index(1) if 1 in each.type_ids else 0 for each in encoded]
    assert starts[3] == 0 < min(starts[:3])
    answers = await driver.run(
        *(pool(each.ids, PoolingTask.SCORE, None, at) for each, at in zip(encoded, starts, strict=True))
    )
    assert [vector(answer)[0] for answer in answers] == pytest.approx(expected, abs=NEAR)
    untyped = score(encoded[0].ids, [0] * len(encoded[0].ids))
    assert abs(untyped - expected[0]) > 100 * NEAR, "the token types must matter, or the test shows nothing"
