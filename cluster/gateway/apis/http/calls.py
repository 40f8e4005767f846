"""The steps of a call that all HTTP APIs share: read the request, and stream the answer.

The pieces of a stream bypass ASGI: a StreamWriter writes the pieces directly to the connection. A streamed response
starts with the first piece or keep-alive, so a call that fails earlier is answered with the status code of the error.
HTTP has no deadlines; instead a call is cancelled as soon as the client disconnects.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any, Final

from cluster.gateway.apis.http.body import Refused, RequestBodies
from cluster.gateway.apis.http.exchange import Exchange
from cluster.gateway.apis.http.protocol import CONNECTION
from cluster.gateway.apis.openai.requests import ParsedRequest
from cluster.gateway.apis.request_ids import trace_state, traceparent
from cluster.gateway.call_service import CallService
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.meta import CallMeta
from cluster.gateway.calls.pooling.pooling_request import ParsedPooling
from cluster.gateway.calls.stream_writer import ChunkDelivery, ChunkEncoder, StreamWriter

AFFINITY_HEADER = b"x-headrace-affinity"
LATE_BODY_S: Final = 1.0
"""Time in seconds after which a body counts as late. The caller of a late body is authenticated once more."""


class HttpCalls:
    """Reads requests for a CallService and streams answers, for all APIs of one HTTP port."""

    def __init__(self, service: CallService, bodies: RequestBodies, api: str = "http") -> None:
        """`api`: name of the API in metrics and in the access log."""
        self.service = service
        self._api = api
        self._bodies = bodies
        self._delivery: ChunkDelivery | None = None

    async def read(self, name: str, exchange: Exchange) -> tuple[ParsedRequest, CallMeta]:
        """Read and parse the body of a generation request. `name`: the name of the parser for the endpoint's bodies.
        Raises CallError, Refused, and ConnectionResetError if the client disconnects before the body ends."""
        parsed: ParsedRequest
        parsed, meta = await self._read(name, exchange)
        return parsed, meta

    async def read_pooling(self, name: str, exchange: Exchange) -> tuple[ParsedPooling, CallMeta]:
        """Read and parse the body of a pooling request. `name`: name of the parser for the body. Raises CallError,
        Refused, and ConnectionResetError if the client disconnects before the body ends."""
        parsed: ParsedPooling
        parsed, meta = await self._read(name, exchange)
        return parsed, meta

    async def _read(self, name: str, exchange: Exchange) -> tuple[Any, CallMeta]:
        """Count a request, then read and parse its body. `name`: the name of the parser for the endpoint's bodies.
        Raises CallError, Refused, and ConnectionResetError if the client disconnects before the body ends."""
        media_type = exchange.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if media_type != b"application/json":  # also prevents cross-site form posts
            raise Refused(415, "unsupported_media_type", "content-type must be application/json")
        trace = traceparent(exchange.header(b"traceparent"))
        meta = CallMeta(
            exchange.request_id,
            self._api,
            traceparent=trace,
            trace_state=trace_state(exchange.header(b"tracestate")) if trace else "",
            principal=exchange.principal,
            affinity_key=exchange.header(AFFINITY_HEADER),
        )
        await self.service.count(meta)
        length = exchange.headers.get(b"content-length", b"")
        connection = exchange.scope[CONNECTION]
        began = time.monotonic()
        body = await self._bodies.receive(exchange.receive, connection, length, meta.tenant)
        exchange.release_body = meta.release_body = body.release
        if time.monotonic() - began >= LATE_BODY_S:  # the credential may have been revoked meanwhile
            meta.principal = await exchange.authenticate()
        max_ids = partial(self.service.tokenization.longest_context, meta.principal)
        return await self.service.bodies.http(name, body.content, meta.tenant, max_ids), meta

    async def stream(self, call: Call, encoder: ChunkEncoder, exchange: Exchange) -> None:
        """Stream the pieces of a call until the end of the call has been sent. Raises the call's error."""
        while not exchange.started:
            await call.output.news()
            if data := encoder.encode_new():
                await exchange.write(data)
                if encoder.ended:
                    return
        if self._delivery is None:
            self._delivery = ChunkDelivery(self.service.unread_answers)
        await StreamWriter(call, encoder, exchange.scope[CONNECTION], self._delivery).run()
