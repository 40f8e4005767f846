"""Resume a broken stream: keep resume tokens, decide whether to retry, and compute the pause before a retry.

Each chunk of a resumable stream carries a resume token, which is a sealed record of the delivered part of the answer
(docs/resume.md). With these tokens any gateway of the cluster can continue the stream after the last chunk that the
client has read, without repetition or gap.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster.client.errors import UNREACHABLE, HeadraceError
from cluster.v1 import inference_pb2 as pb

Request = pb.ChatRequest | pb.CompleteRequest
StreamChunk = pb.ChatChunk | pb.CompleteChunk

MAX_FAILURES = 10
"""Number of consecutive failures, with no text received between them, after which a stream ends.

The pauses after these failures add up to some 15 s.
"""
FIRST_PAUSE_S, MAX_PAUSE_S = 0.1, 2.0
RETRIED_CODES = ("UNAVAILABLE", "RESOURCE_EXHAUSTED")


class Resumption:
    """The state that is needed to resume a stream. The class does no I/O, and reads the time only from `clock`."""

    def __init__(
        self,
        request: Request,
        timeout_s: float | None,
        endpoints: int,
        clock: Callable[[], float] = time.monotonic,
        enabled: bool = True,
    ) -> None:
        """Create the state of a new stream. `endpoints`: number of gateways to try.

        If `enabled` is False, any error ends the stream.
        """
        self._enabled = enabled
        self.request = request
        self._clock = clock
        self._deadline = None if timeout_s is None else clock() + timeout_s
        self._endpoints = endpoints
        self._tokens: list[bytes] = []
        self._offset = 0
        self._received = False
        self._failures = 0

    @property
    def remaining_s(self) -> float | None:
        """Seconds until the deadline of the whole call, or None if the call has no deadline."""
        return None if self._deadline is None else max(self._deadline - self._clock(), 0.001)

    def record(self, chunk: StreamChunk | pb.ResumeChunk | str) -> StreamChunk | str | None:
        """Store the resume token of a chunk. Returns the chunk, or None if the chunk has only the token and nothing for
        the reader."""
        if isinstance(chunk, str):
            self._received = True
            return chunk
        if isinstance(chunk, pb.ResumeChunk):
            chunk = chunk.chat if chunk.HasField("chat") else chunk.complete
        if chunk.resume_token:
            if chunk.resume_token_whole:
                self._tokens.clear()
            self._tokens.append(chunk.resume_token)
            self._offset = chunk.offset
        if chunk.choices:
            self._received, self._failures = True, 0
            return chunk
        return chunk if chunk.HasField("usage") or chunk.HasField("progress") else None

    def pause_s(self, error: HeadraceError) -> float | None:
        """Return the seconds to wait before the next attempt, or None if the error ends the stream."""
        remaining_s = self.remaining_s
        if not self._can_retry(error) or self._failures >= MAX_FAILURES:
            return None
        server_s = error.retry_after_s or 0.0
        backoff_s = min(FIRST_PAUSE_S * 2 ** (self._failures - 1), MAX_PAUSE_S) if self._failures else 0.0
        pause_s = max(server_s, backoff_s)
        self._failures += 1
        return None if remaining_s is not None and pause_s >= remaining_s else pause_s

    def _can_retry(self, error: HeadraceError) -> bool:
        if not self._enabled:
            return False
        if self._tokens:
            # RESOURCE_EXHAUSTED is retried only while the stream is being resumed: for some seconds the lost gateway's
            # call still counts against the tenant's limits.
            return error.code == "UNAVAILABLE" or (bool(self._failures) and _is_transient(error))
        if self._received or error.reason != UNREACHABLE or self._failures >= self._endpoints:
            return False
        # No chunk was received. gRPC itself has already retried the connection, but gRPC does not retry a call after
        # the gateway has begun to answer.
        return self._endpoints > 1 or "failed to connect" not in error.message

    @property
    def resume_request(self) -> pb.ResumeRequest | None:
        """The request that resumes the stream, or None if no resume token was received and the call must start over."""
        if not self._tokens:
            return None
        out = pb.ResumeRequest(resume_tokens=self._tokens, offset=self._offset)
        if isinstance(self.request, pb.ChatRequest):
            out.chat.CopyFrom(self.request)
        else:
            out.complete.CopyFrom(self.request)
        return out


def _is_transient(error: HeadraceError) -> bool:
    return error.code in RETRIED_CODES and error.retry_after_s is not None and error.retry_after_s <= MAX_PAUSE_S
