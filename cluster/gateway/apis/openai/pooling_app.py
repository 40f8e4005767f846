"""The endpoints for embeddings, rankings and scores: /v1/embeddings as in OpenAI's API, /rerank and /score as in vLLM's
server.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator

from cluster.gateway.apis.http.calls import HttpCalls
from cluster.gateway.apis.http.exchange import Exchange, as_headers, while_connected
from cluster.gateway.apis.http.protocol import CONNECTION
from cluster.gateway.apis.openai import pooling_answers
from cluster.gateway.apis.pooling_scores import ranked, scores_of
from cluster.gateway.calls.pooling.pooling_call import PoolingCall
from cluster.gateway.calls.pooling.pooling_request import ParsedPooling

Answer = Callable[[PoolingCall, list[bytes], ParsedPooling], Awaitable[Iterator[bytes]]]


class PoolingEndpoints:
    """The pooling endpoints of a CallService."""

    def __init__(self, calls: HttpCalls) -> None:
        self._service = calls.service
        self._calls = calls

    async def embeddings(self, exchange: Exchange) -> None:
        """Answer /v1/embeddings."""
        await self._respond("embeddings", self._embeddings, exchange)

    async def rerank(self, exchange: Exchange) -> None:
        """Answer /rerank."""
        await self._respond("rerank", self._rerank, exchange)

    async def score(self, exchange: Exchange) -> None:
        """Answer /score."""
        await self._respond("score", self._score, exchange)

    async def _respond(self, name: str, answer: Answer, exchange: Exchange) -> None:
        parsed, meta = await self._calls.read_pooling(name, exchange)

        async def respond() -> None:
            with self._service.unread_answers.answer(meta.tenant) as unread:
                async with self._service.open_pooling(parsed.request, meta, unread) as call:
                    exchange.limit_headers = as_headers(call.headers)
                    vectors = await call.vectors()
                # The call has released its slots by now, so a client that reads slowly holds no slot.
                await exchange.respond_in_parts(200, await answer(call, vectors, parsed), exchange.limit_headers)

        await while_connected(respond(), exchange.scope[CONNECTION])

    async def _embeddings(self, call: PoolingCall, vectors: list[bytes], parsed: ParsedPooling) -> Iterator[bytes]:
        return pooling_answers.embeddings_answer(call, vectors, int(time.time()), parsed.is_base64)

    async def _rerank(self, call: PoolingCall, vectors: list[bytes], parsed: ParsedPooling) -> Iterator[bytes]:
        return pooling_answers.rerank_answer(call, ranked(parsed, await scores_of(call, vectors)))

    async def _score(self, call: PoolingCall, vectors: list[bytes], parsed: ParsedPooling) -> Iterator[bytes]:
        return pooling_answers.score_answer(call, await scores_of(call, vectors), int(time.time()))
