"""How a broken stream goes on: what has to be kept of its chunks, when to try again, and after which pause.

A gateway seals into each chunk of a resumable stream what it delivered (docs/resume.md). With these tokens any gateway
of the cluster goes on behind the last chunk that was read, so nothing comes twice and nothing is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster.client.errors import UNREACHABLE, HeadraceError
from cluster.v1 import inference_pb2 as pb

Request = pb.ChatRequest | pb.CompleteRequest
Piece = pb.ChatChunk | pb.CompleteChunk

MAX_FAILURES = 10
"""As many in a row, without a piece of text between them, end a stream: with their pauses some 15 s."""
FIRST_PAUSE_S, MAX_PAUSE_S = 0.1, 2.0
RETRIED = ("UNAVAILABLE", "RESOURCE_EXHAUSTED")


class Resumption:
    """What one stream keeps to go on from. Pure but for `clock`."""

    def __init__(
        self,
        request: Request,
        timeout_s: float | None,
        endpoints: int,
        clock: Callable[[], float] = time.monotonic,
        wanted: bool = True,
    ) -> None:
        """`endpoints`: how many gateways may be asked. Not `wanted`: an error is the stream's end."""
        self._wanted = wanted
        self.request = request
        self._clock = clock
        self._deadline = None if timeout_s is None else clock() + timeout_s
        self._endpoints = endpoints
        self._tokens: list[bytes] = []
        self._offset = 0
        self._begun = False
        self._failures = 0

    @property
    def left_s(self) -> float | None:
        """Seconds to the deadline of the whole call."""
        return None if self._deadline is None else max(self._deadline - self._clock(), 0.001)

    def note(self, chunk: Piece | pb.ResumeChunk | str) -> Piece | str | None:
        """Keep what a chunk has to be resumed with. The chunk, or None for one that has nothing for the reader."""
        if isinstance(chunk, str):
            self._begun = True
            return chunk
        if isinstance(chunk, pb.ResumeChunk):
            chunk = chunk.chat if chunk.HasField("chat") else chunk.complete
        if chunk.resume_token:
            if chunk.resume_token_whole:
                self._tokens.clear()
            self._tokens.append(chunk.resume_token)
            self._offset = chunk.offset
        if chunk.choices:
            self._begun, self._failures = True, 0
            return chunk
        return chunk if chunk.HasField("usage") or chunk.HasField("progress") else None

    def pause_s(self, error: HeadraceError) -> float | None:
        """How long to wait before the next try; None: there is none, the error is the stream's end."""
        left_s = self.left_s
        if not self._may(error) or self._failures >= MAX_FAILURES:
            return None
        told_s = error.retry_after_s or 0.0
        own_s = min(FIRST_PAUSE_S * 2 ** (self._failures - 1), MAX_PAUSE_S) if self._failures else 0.0
        pause_s = max(told_s, own_s)
        self._failures += 1
        return None if left_s is not None and pause_s >= left_s else pause_s

    def _may(self, error: HeadraceError) -> bool:
        if not self._wanted:
            return False
        if self._tokens:
            # A refusal for want of room is waited out only once the stream is being resumed: a call that the lost
            # gateway held for its tenant counts for some seconds more.
            return error.code == "UNAVAILABLE" or (bool(self._failures) and _passes(error))
        if self._begun or error.reason != UNREACHABLE or self._failures >= self._endpoints:
            return False
        # Nothing has come: gRPC has tried to reach this gateway, but does not begin anew once it had answered at all.
        return self._endpoints > 1 or "failed to connect" not in error.message

    @property
    def resumes(self) -> pb.ResumeRequest | None:
        """The request that goes on; None where nothing has come and the call begins anew."""
        if not self._tokens:
            return None
        out = pb.ResumeRequest(resume_tokens=self._tokens, offset=self._offset)
        if isinstance(self.request, pb.ChatRequest):
            out.chat.CopyFrom(self.request)
        else:
            out.complete.CopyFrom(self.request)
        return out


def _passes(error: HeadraceError) -> bool:
    return error.code in RETRIED and error.retry_after_s is not None and error.retry_after_s <= MAX_PAUSE_S
