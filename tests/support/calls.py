"""Short constructors for requests of inference.proto, and readers of answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from cluster.v1 import inference_pb2 as pb
from cluster.wire.dial import read


def chat(text: str = "Hello, who are you?", *, model: str = "sim", **fields: Any) -> pb.ChatRequest:
    """Return a request with one user message; temperature 0 and 16 tokens by default."""
    fields = {"temperature": 0.0, "max_tokens": 16, **fields}
    return pb.ChatRequest(model=model, messages=[pb.Message(role="user", content=text)], **fields)


def complete(text: str = "Once upon a time", *, model: str = "sim", **fields: Any) -> pb.CompleteRequest:
    """Return a request with a plain prompt; temperature 0 and 16 tokens by default."""
    fields = {"temperature": 0.0, "max_tokens": 16, **fields}
    return pb.CompleteRequest(model=model, prompt=text, **fields)


def text_of(chunks: Iterable[pb.ChatChunk], index: int = 0) -> str:
    """Return the text of one choice over all chunks."""
    return "".join(c.delta.content for chunk in chunks for c in chunk.choices if c.index == index)


class Answer:
    """The error of a gRPC call as a client sees it: code, message, and the parts of google.rpc.Status."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        self.code = error.code()
        self.message = error.details() or ""
        self.trailers = dict(error.trailing_metadata() or ())
        self.reason = ""
        self.fields: list[str] = []
        self.retry_s: float | None = None
        raw = self.trailers.get("grpc-status-details-bin")
        if raw is None:
            return
        assert isinstance(raw, bytes)
        for part in status_pb2.Status.FromString(raw).details:
            info, bad, retry = (
                error_details_pb2.ErrorInfo(),
                error_details_pb2.BadRequest(),
                error_details_pb2.RetryInfo(),
            )
            if part.Unpack(info):
                self.reason = info.reason
                assert info.domain == "headrace"
            elif part.Unpack(bad):
                self.fields = [v.field for v in bad.field_violations]
            elif part.Unpack(retry):
                self.retry_s = retry.retry_delay.ToMilliseconds() / 1000

    def __repr__(self) -> str:
        return f"{self.code.name} {self.reason} {self.message!r} {self.fields}"


async def rest_of(call: Any) -> list[Any]:
    """Return the remaining messages of a stream whose first messages were taken with `read`."""
    out = []
    while (message := await read(call)) is not None:
        out.append(message)
    return out


async def refused(awaitable: Any) -> Answer:
    """Return the error of a call that must fail (a unary call, or a stream that is read to the end)."""
    try:
        if hasattr(awaitable, "__aiter__"):
            async for _ in awaitable:
                pass
        else:
            await awaitable
    except grpc.aio.AioRpcError as error:
        return Answer(error)
    raise AssertionError("the call was answered; it should have been refused")


def resume(request: Any, chunks: Sequence[Any], **changed: Any) -> pb.ResumeRequest:
    """Return the request that resumes a call after these chunks."""
    tokens = [chunk.resume_token for chunk in chunks if chunk.resume_token]
    offset = max((chunk.offset for chunk in chunks), default=0)
    kind = "chat" if isinstance(request, pb.ChatRequest) else "complete"
    return pb.ResumeRequest(**{kind: request, "resume_tokens": tokens, "offset": offset, **changed})
