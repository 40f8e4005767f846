"""Scores and rankings on every API: a cross-encoder scores pairs, and an embedding model compares vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cluster.client import AsyncClient
from cluster.v1 import inference_pb2 as pb
from tests.support.calls import refused
from tests.support.cluster import TestCluster
from tests.support.http import Reply, fetch
from tests.support.pooling import embedded

pytestmark = pytest.mark.slow

QUERY = "what is a cat"
DOCUMENTS = ["a dog", "a cat is an animal", "", "1 + 1", "a dog"]


def rerank_body(**fields: Any) -> dict[str, Any]:
    """Return a body of /rerank."""
    return {"model": "score", "query": QUERY, "documents": DOCUMENTS, **fields}


async def scored(cluster: TestCluster, first: Any, second: Any, model: str = "score", **fields: Any) -> list[float]:
    """Return the scores of pairs, from /score."""
    reply = await fetch(cluster, "/score", {"model": model, "text_1": first, "text_2": second, **fields})
    assert reply.status == 200, reply.body
    data = reply.json["data"]
    assert [(item["index"], item["object"]) for item in data] == [(i, "score") for i in range(len(data))]
    return [item["score"] for item in data]


async def ranking(cluster: TestCluster, path: str = "/rerank", **fields: Any) -> tuple[list[tuple[int, float]], Reply]:
    """Return the indices and scores in an answer of /rerank, and the whole reply."""
    reply = await fetch(cluster, path, rerank_body(**fields))
    assert reply.status == 200, reply.body
    return [(result["index"], result["relevance_score"]) for result in reply.json["results"]], reply


async def test_a_ranking_is_sorted_scores(pooling: TestCluster) -> None:
    """A ranking has the scores of /score and the texts of the documents. The best document is first, and documents with
    equal scores keep the order of the request. This holds for all HTTP paths, gRPC and the SDK."""
    scores = await scored(pooling, QUERY, DOCUMENTS)
    assert scores[0] == scores[4]
    wanted = sorted(enumerate(scores), key=lambda item: -item[1])
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        order, reply = await ranking(pooling, path)
        assert order == wanted
        assert [r["document"] for r in reply.json["results"]] == [{"text": DOCUMENTS[i]} for i, _ in order]
        assert reply.json["usage"]["prompt_tokens"] == reply.json["usage"]["total_tokens"] > 0
    order, reply = await ranking(pooling, top_n=2, return_documents=False)
    assert order == wanted[:2]
    assert all("document" not in result for result in reply.json["results"])
    assert (await ranking(pooling, documents=[{"text": text} for text in DOCUMENTS], top_n=0))[0] == wanted
    raw = await pooling.stub.Rerank(pb.RerankRequest(model="score", query=QUERY, documents=DOCUMENTS))
    assert [(result.index, result.document) for result in raw.results] == [(i, "") for i, _ in wanted]
    assert [np.float32(result.score) for result in raw.results] == [np.float32(score) for _, score in wanted]
    assert raw.usage.prompt_tokens == reply.json["usage"]["prompt_tokens"]
    async with AsyncClient(pooling.gateway.endpoints["grpc"]) as sdk:
        answer = await sdk.rerank("score", QUERY, DOCUMENTS, top_n=3, return_documents=True)
        assert [(result.index, result.document) for result in answer] == [(i, DOCUMENTS[i]) for i, _ in wanted[:3]]


async def test_pairs_are_one_to_many_or_in_step(pooling: TestCluster) -> None:
    """/score compares one text with each text of an array, or two arrays of equal length item by item. All of vLLM's
    names for the two fields are accepted. The score of a pair depends on the order of its two texts, and not on other
    pairs."""
    many = await scored(pooling, QUERY, DOCUMENTS)
    assert await scored(pooling, [QUERY] * len(DOCUMENTS), DOCUMENTS) == many
    assert [(await scored(pooling, QUERY, text))[0] for text in DOCUMENTS] == many
    assert (await scored(pooling, DOCUMENTS[1], QUERY))[0] != many[1]
    for first, second in (("data_1", "data_2"), ("queries", "documents"), ("queries", "items")):
        reply = await fetch(pooling, "/v1/score", {"model": "score", first: QUERY, second: DOCUMENTS})
        assert [item["score"] for item in reply.json["data"]] == many


async def test_an_embedding_model_compares_vectors(pooling: TestCluster) -> None:
    """With an embedding model, the score of a pair is the cosine of the two vectors. Each text is computed once."""
    query, *vectors = await embedded(pooling, [QUERY, *DOCUMENTS])
    cosines = [float(vector @ query) for vector in vectors]
    scores = await scored(pooling, QUERY, DOCUMENTS, model="embed")
    assert np.allclose(scores, cosines, atol=1e-6)
    assert np.allclose(await scored(pooling, DOCUMENTS, DOCUMENTS, model="embed"), 1.0, atol=1e-6)
    order, reply = await ranking(pooling, model="embed")
    assert [i for i, _ in order] == sorted(range(len(scores)), key=lambda i: -scores[i])
    raw = await pooling.stub.Embed(pb.EmbedRequest(model="embed", texts=[QUERY, *DOCUMENTS]))
    assert reply.json["usage"]["prompt_tokens"] == raw.usage.prompt_tokens


BAD: list[tuple[str, dict[str, Any], str, str]] = [
    ("/rerank", {"query": None}, "query", "a string"),
    ("/rerank", {"query": ["a"]}, "query", "a string"),
    ("/rerank", {"documents": []}, "documents", "must not be empty"),
    ("/rerank", {"documents": ["a", 1]}, "documents[1]", "must be a string"),
    ("/rerank", {"documents": ["a", {"image": 1}]}, "documents[1]", "without a text"),
    ("/rerank", {"documents": ["a"] * 2049}, "documents", "at most 2048"),
    ("/rerank", {"documents": ["a", "b " * 100]}, "documents[1]", "holds 64"),
    ("/rerank", {"top_n": -1}, "top_n", "at least 0"),
    ("/rerank", {"max_tokens_per_doc": 9}, "max_tokens_per_doc", "not supported"),
    ("/score", {}, "text_1", "is missing"),
    ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1", "one text or as many as text_2 (3)"),
    ("/score", {"queries": "a", "items": ["b", "c " * 100]}, "items[1]", "holds 64"),
    ("/score", {"text_1": "a", "text_2": "b", "model": "sim"}, "model", "no task score or embed, it generates"),
]


@pytest.mark.parametrize(("path", "fields", "param", "says"), BAD, ids=[f"{b[2]}-{i}" for i, b in enumerate(BAD)])
async def test_a_wrong_field_is_named(
    pooling: TestCluster, path: str, fields: dict[str, Any], param: str, says: str
) -> None:
    """The error for a wrong field uses the field name that the caller wrote."""
    body = rerank_body(**fields) if path == "/rerank" else {"model": "score", **fields}
    reply = await fetch(pooling, path, body)
    assert reply.status == 400, reply.body
    assert (reply.error["param"], says in reply.error["message"]) == (param, True), reply.error


async def test_long_documents_are_cut(pooling: TestCluster) -> None:
    """With truncation, a pair that is too long is scored: the document is cut and the query is kept."""
    long = "word " * 200
    one, other = await scored(pooling, [QUERY, "no cat"], [long, long], truncate_prompt_tokens=-1)
    assert one != other
    assert (await ranking(pooling, documents=[long], truncate_prompt_tokens=-1))[0] == [(0, one)]
    request = pb.RerankRequest(model="score", query=QUERY, documents=[long])
    assert (await refused(pooling.stub.Rerank(request))).fields == ["documents[0]"]
    request.truncate = True
    assert np.float32((await pooling.stub.Rerank(request)).results[0].score) == np.float32(one)
