"""Encoding of vectors, scores and rankings as the JSON of OpenAI's and vLLM's answers.

An answer may have 100 MB. It is encoded in parts, each when the client has read those before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Final

from cluster.gateway.apis.openai.answers import body
from cluster.gateway.apis.pooling_scores import Ranked
from cluster.gateway.calls.pooling.pooling_call import PoolingCall

PIECE_CHARS: Final = 1 << 16
"""Number of a document's characters that are written at once."""
_escape = json.encoder.encode_basestring_ascii


def embeddings_answer(call: PoolingCall, vectors: list[bytes], created: int, is_base64: bool) -> Iterator[bytes]:
    """Yield the body of an answer of /v1/embeddings, as pieces of JSON. The list of vectors is emptied. `created`: Unix
    time. `is_base64`: encode vectors in base64, not as lists of numbers."""
    from cluster.gateway.apis.openai.vectors import embeddings  # not at the start: deferred_imports.py

    yield _head(call, created) + b'"data":['
    for at, item in enumerate(embeddings(vectors, is_base64)):
        yield b"," + item if at else item
    yield b"]}"


def score_answer(call: PoolingCall, scores: Sequence[float], created: int) -> Iterator[bytes]:
    """Yield the parts of the answer of /score."""
    data = [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)]
    yield _head(call, created) + b'"data":' + body(data) + b"}"


def rerank_answer(call: PoolingCall, results: Sequence[Ranked]) -> Iterator[bytes]:
    """Yield the parts of the answer of /rerank."""
    yield body({"id": call.id, "model": call.model, "usage": _usage(call)})[:-1] + b',"results":['
    yield from ranking_json(results)
    yield b"]}"


def ranking_json(results: Sequence[Ranked]) -> Iterator[bytes]:
    """Yield the JSON of a ranking with commas between its entries. A long document is written in pieces, since a
    document may have 16 MB."""
    for at, result in enumerate(results):
        yield f'{"," if at else ""}{{"index":{result.index},'.encode("ascii")
        if (text := result.text) is not None:
            yield b'"document":{"text":"'
            for begin in range(0, len(text), PIECE_CHARS):
                yield _escape(text[begin : begin + PIECE_CHARS])[1:-1].encode("ascii")
            yield b'"},'
        yield f'"relevance_score":{result.score!r}}}'.encode("ascii")


def _head(call: PoolingCall, created: int) -> bytes:
    head = {"id": call.id, "object": "list", "created": created, "model": call.model, "usage": _usage(call)}
    return body(head)[:-1] + b","


def _usage(call: PoolingCall) -> dict[str, int]:
    tokens = call.usage.prompt_tokens
    return {"prompt_tokens": tokens, "total_tokens": tokens}
