"""Answers of the methods Embed and Rerank, inside and outside of sessions."""

from __future__ import annotations

from cluster.gateway.apis.grpc import answers as codec
from cluster.gateway.apis.pooling_scores import ranked, scores_of
from cluster.gateway.calls.pooling.pooling_call import PoolingCall
from cluster.gateway.calls.pooling.pooling_request import PairInputs, ParsedPooling


async def pooling_response(call: PoolingCall, vectors: list[bytes], parsed: ParsedPooling) -> list[bytes | bytearray]:
    """Return a serialized EmbedResponse in parts, or a RerankResponse if the call's inputs are pairs. An EmbedResponse
    empties the list of vectors."""
    if not isinstance(parsed.request.inputs, PairInputs):
        return codec.embed_response(call, vectors)
    return [codec.rerank_response(call, ranked(parsed, await scores_of(call, vectors)))]
