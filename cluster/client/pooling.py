"""Requests for embeddings and rankings, and their answers."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from cluster.v1 import inference_pb2 as pb

Texts = str | Sequence[str] | Sequence[Sequence[int]]


class PoolingParams(TypedDict, total=False):
    """Parameters of `embed` and `rerank`, with the names of the API.

    `truncate`: cut longer texts at the end instead of refusing them.
    """

    truncate: bool
    user: str
    priority: str
    affinity_key: str
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class EmbedAnswer(Sequence[array]):  # type: ignore[type-arg] # array has no parameter at run time
    """The vectors of texts, in the order of the texts. Each vector is an array of float32 values, which numpy reads
    without a copy (`numpy.asarray(vector)`)."""

    embeddings: tuple[array[float], ...]
    usage: pb.Usage
    id: str
    model: str
    request_id: str
    raw: pb.EmbedResponse = field(repr=False)

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, i: Any) -> Any:
        return self.embeddings[i]

    def __iter__(self) -> Iterator[array[float]]:
        return iter(self.embeddings)


@dataclass(frozen=True, slots=True)
class RankedDocument:
    """A document in a ranking. `index`: its index in the request. `document`: its text, or "" if the request did not
    set `return_documents`."""

    index: int
    score: float
    document: str = ""


@dataclass(frozen=True, slots=True)
class RerankAnswer:
    """The documents of a request, sorted by score, the best first."""

    results: tuple[RankedDocument, ...]
    usage: pb.Usage
    id: str
    model: str
    request_id: str
    raw: pb.RerankResponse = field(repr=False)

    def __iter__(self) -> Iterator[RankedDocument]:
        return iter(self.results)


def embed_request(model: str, texts: Texts, dimensions: int | None, params: Mapping[str, Any]) -> pb.EmbedRequest:
    """Build an EmbedRequest. `texts`: one text, several texts, or several lists of token ids."""
    fields = _given(params)
    request = pb.EmbedRequest(model=model, dimensions=dimensions, **fields)
    if isinstance(texts, str):
        request.texts.append(texts)
        return request
    for i, text in enumerate(texts):
        if isinstance(text, str) is not isinstance(texts[0], str):
            raise TypeError(f"texts[{i}]: must be of the same kind as texts[0], all texts or all lists of token ids")
        if isinstance(text, str):
            request.texts.append(text)
        else:
            request.token_ids.add(ids=text)
    return request


def rerank_request(
    model: str,
    query: str,
    documents: Sequence[str],
    top_n: int | None,
    return_documents: bool,
    params: Mapping[str, Any],
) -> pb.RerankRequest:
    """Build a RerankRequest. `top_n`: maximum number of documents in the ranking; None for all documents."""
    if isinstance(documents, str):
        raise TypeError("documents: must be a list of texts, not one text")
    return pb.RerankRequest(
        model=model,
        query=query,
        documents=documents,
        top_n=top_n,
        return_documents=return_documents,
        **_given(params),
    )


def _given(params: Mapping[str, Any]) -> dict[str, Any]:
    known = PoolingParams.__annotations__
    for name in params:
        if name not in known:
            raise TypeError(f"unknown parameter {name!r}; known are {', '.join(sorted(known))}")
    return {name: value for name, value in params.items() if value is not None}


def embed_answer(raw: pb.EmbedResponse, request_id: str) -> EmbedAnswer:
    """Convert a response message to an EmbedAnswer."""
    vectors = tuple(array("f", embedding.values) for embedding in raw.embeddings)
    return EmbedAnswer(vectors, raw.usage, raw.id, raw.model, request_id, raw)


def rerank_answer(raw: pb.RerankResponse, request_id: str) -> RerankAnswer:
    """Convert a response message to a RerankAnswer."""
    results = tuple(RankedDocument(result.index, result.score, result.document) for result in raw.results)
    return RerankAnswer(results, raw.usage, raw.id, raw.model, request_id, raw)
