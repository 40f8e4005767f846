"""Answers of the methods Embed and Rerank, inside and outside of sessions."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.gateway.apis.grpc import answers as codec
from cluster.gateway.apis.pooling_scores import ranked, scores_of
from cluster.gateway.calls.pooling.pooling_call import PoolingCall
from cluster.gateway.calls.pooling.pooling_request import PairInputs, ParsedPooling


async def pooling_response(call: PoolingCall, vectors: Sequence[bytes], parsed: ParsedPooling) -> bytes:
    """Return a serialized EmbedResponse, or a RerankResponse if the call's inputs are pairs."""
    if not isinstance(parsed.request.inputs, PairInputs):
        return codec.embed_response(call, vectors)
    return codec.rerank_response(call, ranked(parsed, await scores_of(call, vectors)))
