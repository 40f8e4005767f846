"""Embedding and rerank requests are built from plain values, and their answers are typed."""

from __future__ import annotations

from array import array

import pytest
from google.rpc import code_pb2

from cluster.client import Client
from cluster.client.pooling import embed_answer, embed_request, rerank_answer, rerank_request
from cluster.v1 import inference_pb2 as pb
from tests.support.scripted_gateway import ScriptedGateway, refusal


def test_texts_become_messages() -> None:
    """One text, several texts and lists of token ids become the fields of a request; unset options stay unset."""
    assert embed_request("m", "a", None, {}) == pb.EmbedRequest(model="m", texts=["a"])
    assert embed_request("m", ["a", "b"], 3, {"truncate": True, "user": None}) == pb.EmbedRequest(
        model="m", texts=["a", "b"], dimensions=3, truncate=True
    )
    wanted = pb.EmbedRequest(model="m", token_ids=[pb.TokenIds(ids=[1, 2]), pb.TokenIds(ids=[3])])
    assert embed_request("m", [[1, 2], [3]], None, {}) == wanted
    assert rerank_request("m", "q", ["a"], 1, False, {"metadata": {"k": "v"}}) == pb.RerankRequest(
        model="m", query="q", documents=["a"], top_n=1, return_documents=False, metadata={"k": "v"}
    )


def test_wrong_values_are_named() -> None:
    """Mixed inputs, a string in place of a list of documents, and unknown parameters raise TypeError.

    The error names the parameter.
    """
    with pytest.raises(TypeError, match=r"texts\[1\]"):
        embed_request("m", ["a", [1]], None, {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="documents"):
        rerank_request("m", "q", "a", None, False, {})
    with pytest.raises(TypeError, match="unknown parameter 'temperature'"):
        embed_request("m", "a", None, {"temperature": 1})


def test_a_refused_call_is_retried(gateway: ScriptedGateway) -> None:
    """Calls for embeddings and rankings are retried after a refusal, with the same request id."""
    loading = refusal(code_pb2.UNAVAILABLE, "MODEL_LOADING", "loading", retry_after_s=0.01)
    gateway.script.refusals, gateway.script.pushback_ms = [loading, loading], 10
    with Client(gateway.endpoint) as client:
        answer = client.embed("tiny", ["a", "bb"], request_id="mine")
        assert [list(vector) for vector in answer] == [[1, 0], [2, 1]]
        assert answer.request_id == "mine"
        assert [result.index for result in client.rerank("tiny", "q", ["a", "bb"])] == [1, 0]
    assert len(gateway.script.requests) == 4
    assert {metadata["x-request-id"] for metadata in gateway.script.metadata[:3]} == {"mine"}


def test_answers_are_sequences() -> None:
    """The answer of `embed` is a sequence of arrays, and the answer of `rerank` is a sequence of ranked documents."""
    raw = pb.EmbedResponse(id="i", model="m", embeddings=[pb.Embedding(index=0, values=[0.5, 1.5])])
    answer = embed_answer(raw, "r")
    assert (len(answer), answer[0], list(answer), answer.request_id) == (
        1,
        array("f", [0.5, 1.5]),
        [array("f", [0.5, 1.5])],
        "r",
    )
    ranking = rerank_answer(pb.RerankResponse(results=[pb.RankedDocument(index=2, score=0.5, document="d")]), "r")
    assert [(one.index, one.score, one.document) for one in ranking] == [(2, 0.5, "d")]
