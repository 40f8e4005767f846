"""A gRPC client with little overhead for StreamChat and StreamComplete of cluster.v1. It runs on the event loop of the
load driver. A connection carries one call at a time and is kept for later calls.

The load driver must use less CPU than the servers that it measures (see also http1.py). The client of grpc.aio passes a
call through threads and a completion queue. With a single stream this takes a measurable time, which would wrongly be
counted as the server's time. Callers that use grpcio spend this time with any server.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.http2.client import CallEnded, GrpcClient, connect
from cluster.v1 import inference_pb2 as pb
from loadtests.faces.base import Answer, CallFailed, OnText, Request
from loadtests.faces.grpc_stream import CHAT, COMPLETE, answer, failed, message_of


class GrpcLean:
    """Client with one connection per running call. The most recently used connection is used next."""

    name = "grpc"

    def __init__(self, address: str, model: str, *, metadata: Sequence[tuple[str, str]] = ()) -> None:
        self._address = address
        self._model = model
        self._metadata = tuple(metadata)
        self._idle: list[GrpcClient] = []

    async def run(self, request: Request, on_text: OnText) -> Answer:
        """Make a call; see Face.run."""
        client = await self._connection()
        usage: pb.Usage | None = None
        finish, started = "", False
        chunks = pb.ChatChunk if request.chat else pb.CompleteChunk
        try:
            call = client.call(CHAT if request.chat else COMPLETE, bytes, chunks.FromString, self._metadata)
            try:
                call.send(message_of(request, self._model).SerializeToString())
                call.done_writing()
                async for chunk in call:
                    for choice in chunk.choices:
                        text = choice.delta.content if request.chat else choice.text
                        if text:
                            started = True
                            on_text(text)
                        finish = choice.finish_reason or finish
                    if chunk.HasField("usage"):
                        usage = chunk.usage
            finally:
                call.cancel()
        except CallEnded as error:
            raise failed(error.code, error.details, started) from None
        finally:
            if client.usable:
                self._idle.append(client)
            else:
                client.close()
        return answer(usage, finish)

    async def _connection(self) -> GrpcClient:
        while self._idle:
            client = self._idle.pop()
            if client.usable:
                return client
        try:
            return await connect(self._address)
        except OSError as error:
            raise CallFailed(CallFailed.UNREACHABLE, f"{self._address}: {error.strerror or error}") from None

    async def close(self) -> None:
        """Close all connections; see Face.close."""
        while self._idle:
            self._idle.pop().close()
