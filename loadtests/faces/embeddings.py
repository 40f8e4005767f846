"""Clients for embeddings: over /v1/embeddings of any OpenAI-compatible server, and over the gRPC method Embed. An
answer counts as one token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import grpc

from cluster.v1 import inference_pb2 as pb
from cluster.v1 import inference_pb2_grpc as pb_grpc
from loadtests.faces.base import Answer, CallFailed, OnText, Request
from loadtests.faces.openai_sse import OpenAiSse

PATH = "/v1/embeddings"


class HttpEmbeddings(OpenAiSse):
    """Client of the HTTP API for embeddings. A request's prompt is the text to embed. The class inherits its
    connections from OpenAiSse."""

    name = "http embeddings"

    async def run(self, request: Request, on_text: OnText) -> Answer:
        """Request the vector of a text, and return the answer. `on_text` is called once, when the answer is complete.
        Implements `Face.run`."""
        answer = await self.ask({"model": self._model, "input": request.prompt, "encoding_format": "float"})
        on_text("vector")
        return Answer(1, answer["usage"]["prompt_tokens"])

    async def vectors(self, texts: list[str]) -> list[list[float]]:
        """Return the vector of each text."""
        answer = await self.ask({"model": self._model, "input": texts, "encoding_format": "float"})
        return [item["embedding"] for item in sorted(answer["data"], key=lambda item: item["index"])]

    async def ask(self, value: Mapping[str, Any]) -> Any:
        """Send a body and return the answer. Raises CallFailed."""
        connection = await self._connection()
        pieces: list[bytes] = []
        whole = False
        try:
            status = await connection.request(self._post(PATH, json.dumps(value).encode()), pieces.append)
            whole = True
        finally:
            self._release(connection, whole=whole)
        body = b"".join(pieces)
        if status != 200:
            raise CallFailed(f"status {status}", body[:300].decode(errors="replace"))
        return json.loads(body)


class GrpcEmbeddings:
    """Client of Embed over one channel."""

    name = "grpc embeddings"

    def __init__(self, address: str, model: str, metadata: tuple[tuple[str, str], ...]) -> None:
        """Store the address (host:port), the model, and the metadata of every call."""
        self._channel = grpc.aio.insecure_channel(address)
        self._stub = pb_grpc.InferenceStub(self._channel)
        self._model, self._metadata = model, metadata

    async def run(self, request: Request, on_text: OnText) -> Answer:
        """Make a call; see Face.run."""
        message = pb.EmbedRequest(model=self._model, texts=[request.prompt])
        try:
            answer = await self._stub.Embed(message, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            unreachable = error.code() is grpc.StatusCode.UNAVAILABLE
            kind = CallFailed.UNREACHABLE if unreachable else f"status {error.code().name}"
            raise CallFailed(kind, error.details() or "") from None
        on_text("vector")
        return Answer(1, answer.usage.prompt_tokens)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()
