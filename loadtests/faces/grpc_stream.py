"""Client of cluster.v1's StreamChat and StreamComplete, for our gateway or Ray Serve's gRPC proxy.

Ray Serve's proxy takes the same messages: the metadata names the application, and the last part of the gRPC path names
the method of the deployment that Ray Serve calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from cluster.v1 import inference_pb2 as pb
from loadtests.faces.base import Answer, CallFailed, OnText, Request

CHANNELS = 16
OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 1000),  # also bounds each connection attempt: a busy server is not a dead one
    ("grpc.max_reconnect_backoff_ms", 500),
)
CHAT = "/cluster.v1.Inference/StreamChat"
COMPLETE = "/cluster.v1.Inference/StreamComplete"


def message_of(request: Request, model: str, resumable: bool = False) -> pb.ChatRequest | pb.CompleteRequest:
    """Return the protobuf message of a request. The message requests greedy decoding of exactly `max_tokens` tokens."""
    options: dict[str, Any] = {
        "model": request.model or model,
        "max_tokens": request.max_tokens,
        "temperature": 0.0,
        "top_p": 1.0,
        "ignore_eos": True,
        "resumable": resumable or None,
    }
    if request.chat:
        return pb.ChatRequest(messages=[pb.Message(role="user", content=request.prompt)], **options)
    return pb.CompleteRequest(prompt=request.prompt, **options)


def failure(error: grpc.RpcError, started: bool) -> CallFailed:
    """Convert a gRPC error into a failure that the driver counts by its status. UNAVAILABLE before the first chunk
    means that no server is there."""
    return failed(error.code(), str(error.details() or "").strip(), started)


def failed(code: grpc.StatusCode, detail: str, started: bool) -> CallFailed:
    """Return the failure for the gRPC status `code` with the message `detail`. `started`: whether a chunk was
    received."""
    if code is grpc.StatusCode.UNAVAILABLE:
        return CallFailed(CallFailed.BROKEN if started else CallFailed.UNREACHABLE, detail)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return CallFailed(CallFailed.TIMEOUT, detail)
    return CallFailed(f"status {code.name}", detail)


class GrpcStream:
    """Client with one stream per call. Calls are spread over a few connections in turn."""

    name = "grpc"

    def __init__(
        self,
        address: str,
        model: str,
        *,
        channels: int = CHANNELS,
        metadata: Sequence[tuple[str, str]] = (),
        chat_path: str = CHAT,
        complete_path: str = COMPLETE,
        resumable: bool = False,
    ) -> None:
        """Open the connections. `resumable`: chunks carry resume tokens."""
        self._resumable = resumable
        self._model = model
        self._metadata = tuple(metadata)
        self._channels = [grpc.aio.insecure_channel(address, options=OPTIONS) for _ in range(channels)]
        self._chat = [_method(c, chat_path, pb.ChatChunk) for c in self._channels]
        self._complete = [_method(c, complete_path, pb.CompleteChunk) for c in self._channels]
        self._turn = 0

    async def run(self, request: Request, on_text: OnText) -> Answer:
        """Make a call; see Face.run."""
        self._turn = (self._turn + 1) % len(self._channels)
        method = (self._chat if request.chat else self._complete)[self._turn]
        call = method(message_of(request, self._model, self._resumable), metadata=self._metadata)
        usage: pb.Usage | None = None
        finish, started = "", False
        try:
            async for chunk in call:
                for choice in chunk.choices:
                    text = choice.delta.content if request.chat else choice.text
                    if text:
                        started = True
                        on_text(text)
                    finish = choice.finish_reason or finish
                if chunk.HasField("usage"):
                    usage = chunk.usage
        except grpc.RpcError as error:
            raise failure(error, started) from None
        finally:
            call.cancel()
        return answer(usage, finish)

    async def close(self) -> None:
        """Close all connections; see Face.close."""
        for channel in self._channels:
            await channel.close()


def answer(usage: pb.Usage | None, finish: str) -> Answer:
    """Return the answer at the end of a stream. Raises CallFailed if the stream ended without usage."""
    if usage is None:
        raise CallFailed(CallFailed.PROTOCOL, "the stream ended without usage")
    return Answer(usage.completion_tokens, usage.prompt_tokens, usage.cached_tokens, finish)


def _method(channel: grpc.aio.Channel, path: str, chunk: Any) -> Any:
    return channel.unary_stream(
        path, request_serializer=lambda message: message.SerializeToString(), response_deserializer=chunk.FromString
    )
