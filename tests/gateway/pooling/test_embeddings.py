"""Tests of embeddings on every API. All forms of input give equal vectors. Usage, shortened vectors and refusals are
also tested."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.client import AsyncClient
from cluster.gateway.calls.pooling.pooling_request import MAX_INPUTS
from cluster.v1 import inference_pb2 as pb
from cluster.wire.bundle import Bundle
from tests.support.calls import chat, refused
from tests.support.cluster import TestCluster
from tests.support.http import Reply, chat_body, client, fetch
from tests.support.pooling import DIMENSIONS, Vectors, embedded, pooling_cluster, vectors_of

pytestmark = pytest.mark.slow

TEXTS = ["one", "another text", "один", "one"]


def body(**fields: Any) -> dict[str, Any]:
    """Return a body of /v1/embeddings."""
    return {"model": "embed", "input": TEXTS, **fields}


async def embeddings(cluster: TestCluster, **fields: Any) -> tuple[Vectors, Reply]:
    """Return the vectors in an answer of /v1/embeddings, and the whole reply."""
    reply = await fetch(cluster, "/v1/embeddings", body(**fields))
    assert reply.status == 200, reply.body
    data = reply.json["data"]
    assert [item["index"] for item in data] == list(range(len(data)))
    assert {item["object"] for item in data} == {"embedding"}
    return vectors_of([item["embedding"] for item in data]), reply


async def test_all_forms_of_an_input_have_the_same_vectors(pooling: TestCluster) -> None:
    """A string, an array of strings, token ids and arrays of token ids give equal vectors over HTTP, gRPC and the
    SDK."""
    ids = [list((await pooling.stub.Tokenize(pb.TokenizeRequest(model="embed", text=t))).token_ids) for t in TEXTS]
    vectors, reply = await embeddings(pooling)
    tokens = sum(map(len, ids))
    assert reply.json["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert (reply.json["object"], reply.json["model"]) == ("list", "embed")
    assert vectors.shape == (len(TEXTS), DIMENSIONS)
    assert np.array_equal(vectors[0], vectors[3])
    assert not np.array_equal(vectors[0], vectors[1])
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-6)
    for fields in ({"input": ids}, {"encoding_format": "base64"}, {"user": "someone", "unknown": 1}):
        assert np.array_equal((await embeddings(pooling, **fields))[0], vectors)
    for one in (TEXTS[1], ids[1]):
        assert np.array_equal((await embeddings(pooling, input=one))[0], vectors[1:2])
    assert np.array_equal(await embedded(pooling, TEXTS), vectors)
    lists = [pb.TokenIds(ids=one) for one in ids]
    raw = await pooling.stub.Embed(pb.EmbedRequest(model="embed", token_ids=lists))
    assert np.array_equal(vectors_of([one.values for one in raw.embeddings]), vectors)
    assert [one.index for one in raw.embeddings] == [0, 1, 2, 3]
    assert (raw.usage.prompt_tokens, raw.usage.completion_tokens) == (tokens, 0)
    async with AsyncClient(pooling.gateway.endpoints["grpc"]) as sdk:
        answer = await sdk.embed("embed", TEXTS)
        assert np.array_equal(np.stack([np.asarray(vector) for vector in answer]), vectors)
        assert answer.usage.prompt_tokens == tokens
        assert np.array_equal(np.asarray((await sdk.embed("embed", TEXTS[1]))[0]), vectors[1])
        assert np.array_equal(np.asarray((await sdk.embed("embed", ids))[2]), vectors[2])


async def test_openais_client(pooling: TestCluster) -> None:
    """OpenAI's client gets the same float32 values with either encoding, base64 (the client's default) and float."""
    vectors = await embedded(pooling, TEXTS)
    async with client(pooling) as ai:
        default = await ai.embeddings.create(model="embed", input=TEXTS)
        numbers = await ai.embeddings.create(model="embed", input=TEXTS, encoding_format="float")
        short = await ai.embeddings.create(model="embed", input=TEXTS, dimensions=3)
    for answer in (default, numbers):
        assert np.array_equal(vectors_of([item.embedding for item in answer.data]), vectors)
    shorter = vectors[:, :3] / np.linalg.norm(vectors[:, :3], axis=1, keepdims=True)
    assert np.allclose(vectors_of([item.embedding for item in short.data]), shorter, atol=1e-6)
    assert default.usage.total_tokens == default.usage.prompt_tokens > 0


async def test_a_large_answer_has_the_values_of_small_ones(pooling: TestCluster) -> None:
    """In a batch of the largest allowed size, each input has the same vector as by itself, in order. Helper processes
    parse the body and write the answer."""
    texts = [f"{i} of {MAX_INPUTS}" for i in range(MAX_INPUTS)]
    vectors, reply = await embeddings(pooling, input=texts)
    assert vectors.shape == (MAX_INPUTS, DIMENSIONS)
    assert np.array_equal(vectors[::500], await embedded(pooling, texts[::500]))
    ids = [[1 + i % 100, 2] for i in range(MAX_INPUTS)]
    numbers = (await embeddings(pooling, input=ids))[0]
    assert np.array_equal((await embeddings(pooling, input=ids, encoding_format="base64"))[0], numbers)
    assert np.array_equal(numbers[:100], numbers[100:200])
    assert reply.json["usage"]["prompt_tokens"] > MAX_INPUTS


LONG = "word " * 200


async def test_long_inputs_are_refused_or_cut(pooling: TestCluster) -> None:
    """An input that is longer than the model's context is refused, and the error names its index. If the request allows
    truncation, to the context or to a given number of tokens, the vector equals that of the truncated input."""
    reply = await fetch(pooling, "/v1/embeddings", body(input=["short", LONG]))
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    assert reply.error["param"] == "input[1]"
    assert "holds 64" in reply.error["message"]
    answer = await refused(pooling.stub.Embed(pb.EmbedRequest(model="embed", texts=["short", LONG])))
    assert (answer.reason, answer.fields) == ("CONTEXT_LENGTH_EXCEEDED", ["texts[1]"])
    ids = list((await pooling.stub.Tokenize(pb.TokenizeRequest(model="sim", text=LONG))).token_ids)
    for keep, kept in ((-1, 64), (5, 5)):
        cut, reply = await embeddings(pooling, input=["short", LONG], truncate_prompt_tokens=keep)
        assert np.array_equal(cut[1:], (await embeddings(pooling, input=[ids[:kept]]))[0])
        assert np.array_equal(cut[1:], (await embeddings(pooling, input=[ids], truncate_prompt_tokens=keep))[0])
    assert np.array_equal(
        await embedded(pooling, [LONG], truncate=True), (await embeddings(pooling, input=[ids[:64]]))[0]
    )


async def test_token_ids_are_cut_like_texts(tmp_path: Path, checkpoint: Path, bundle: Bundle) -> None:
    """If the model's tokenizer cuts on the left, token ids keep their end, as texts do beside their special tokens."""
    config = json.loads(bundle.files["tokenizer_config.json"]) | {"truncation_side": "left"}
    left = Bundle({**bundle.files, "tokenizer_config.json": json.dumps(config).encode()})
    async with pooling_cluster(tmp_path, checkpoint, left) as cluster:
        text = f"{LONG} end"
        ids = list((await cluster.stub.Tokenize(pb.TokenizeRequest(model="sim", text=text))).token_ids)
        for given, kept in ((ids, ids[-5:]), (text, [ids[0], *ids[-4:]]), (ids[:3], ids[:3])):
            cut, _ = await embeddings(cluster, input=[given], truncate_prompt_tokens=5)
            assert np.array_equal(cut, (await embeddings(cluster, input=[kept]))[0])
        await cluster.until_idle()


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"input": None}, "input", "must not be empty"),
    ({"input": []}, "input", "must not be empty"),
    ({"input": 7}, "input", "must be a string or an array"),
    ({"input": ["a", 7]}, "input[1]", "must be a string"),
    ({"input": [[1], "a"]}, "input[1]", "array of token ids"),
    ({"input": [[1], []]}, "input[1]", "must not be empty"),
    ({"input": [1.5]}, "input[0]", "whole number"),
    ({"input": [[1], [2, 10**6]]}, "input[1][1]", "vocabulary"),
    ({"input": [[1], [2, -1]]}, "input[1][1]", "vocabulary"),
    ({"input": [10**7]}, "input[0]", "vocabulary"),
    ({"input": ["a"] * (MAX_INPUTS + 1)}, "input", f"at most {MAX_INPUTS}"),
    ({"encoding_format": "bytes"}, "encoding_format", "float or base64"),
    ({"dimensions": 0}, "dimensions", "at least 1"),
    ({"dimensions": DIMENSIONS + 1}, "dimensions", f"1 to {DIMENSIONS}"),
    ({"dimensions": "many"}, "dimensions", "whole number"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1, or -1"),
    ({"truncate_prompt_tokens": 65}, "truncate_prompt_tokens", "at most 64"),
    ({"priority": "nobody"}, "priority", "one of"),
    ({"padding": "max_length"}, "padding", "not supported"),
    ({"messages": []}, "messages", "not supported"),
    ({"metadata": {"a": 1}}, "metadata.a", "a string"),
]


@pytest.mark.parametrize(("fields", "param", "says"), BAD, ids=[f"{param}-{i}" for i, (_, param, _) in enumerate(BAD)])
async def test_a_wrong_field_is_named(pooling: TestCluster, fields: dict[str, Any], param: str, says: str) -> None:
    """The error for a wrong field names the field and says which values are allowed. This holds for a small body, which
    the gateway parses itself, and for a large body, which a helper process parses."""
    for padding in (0, 3 << 20):
        reply = await fetch(pooling, "/v1/embeddings", body(**fields, unknown="x" * padding))
        assert reply.status == 400, reply.body
        assert (reply.error["param"], says in reply.error["message"]) == (param, True), reply.error
    assert not pooling.gateway.service.statistics()


async def test_a_wrong_message_is_refused(pooling: TestCluster) -> None:
    """A gRPC error names the wrong field of the message."""
    for request, fields in (
        (pb.EmbedRequest(model="embed"), ["texts"]),
        (pb.EmbedRequest(model="embed", texts=["a"], token_ids=[pb.TokenIds(ids=[1])]), ["token_ids"]),
        (pb.EmbedRequest(model="embed", token_ids=[pb.TokenIds(ids=[1]), pb.TokenIds()]), ["token_ids[1]"]),
        (pb.EmbedRequest(model="embed", token_ids=[pb.TokenIds(ids=[1, -5])]), ["token_ids[0].ids[1]"]),
        (pb.EmbedRequest(model="embed", texts=["a"], dimensions=99), ["dimensions"]),
        (pb.EmbedRequest(model="embed", texts=["a"] * (MAX_INPUTS + 1)), ["texts"]),
    ):
        answer = await refused(pooling.stub.Embed(request))
        assert (answer.reason, answer.fields) == ("INVALID_FIELD", fields)


async def test_the_other_kind_of_model_is_refused_with_a_remedy(pooling: TestCluster) -> None:
    """A pooling call to a model that generates text is refused at once, and so is a generation call to a pooling model.
    The error names what to use. Lists of models show the tasks."""
    reply = await fetch(pooling, "/v1/embeddings", body(model="sim"))
    assert (reply.status, reply.error["code"], reply.error["param"]) == (400, "unsupported_feature", "model")
    assert "it generates text" in reply.error["message"]
    assert "pools:embed" in reply.error["message"]
    reply = await fetch(pooling, "/v1/embeddings", body(model="score"))
    assert "no task embed, its tasks are score" in reply.error["message"]
    for path, fields in (
        ("/v1/chat/completions", chat_body(model="embed")),
        ("/v1/completions", {"model": "embed", "prompt": "a"}),
    ):
        reply = await fetch(pooling, path, fields)
        assert (reply.status, reply.error["code"]) == (400, "unsupported_feature")
        assert "/v1/embeddings" in reply.error["message"]
    assert "/v1/rerank" in (await refused(pooling.stub.StreamChat(chat(model="score")))).message
    cards = {card["id"]: card["tasks"] for card in (await fetch(pooling, "/v1/models")).json["data"]}
    assert cards == {"embed": ["embed"], "score": ["score"], "sim": ["generate"]}
    models = (await pooling.stub.ListModels(pb.ListModelsRequest())).models
    pools = {model.name: [word for word in model.capabilities if word.startswith("pools:")] for model in models}
    assert pools == {"embed": ["pools:embed"], "score": ["pools:score"], "sim": []}


async def test_a_single_number_is_written_shortly(pooling: TestCluster) -> None:
    """The JSON of a vector has at most nine digits for each number."""
    text = (await embeddings(pooling))[1].body.decode()
    numbers = json.loads(text, parse_float=lambda word: len(word.split("e")[0].replace("-", "").replace(".", "")))
    lengths = [length for item in numbers["data"] for length in item["embedding"]]
    assert max(lengths) <= 10  # nine digits, and the zero before the point
