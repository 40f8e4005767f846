"""What a call has to say, as the serialized chunks of inference.proto; with resume tokens where it is resumable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from google.protobuf.message import Message

from cluster.gateway.apis.grpc import answers as codec
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.sequence import Piece
from cluster.gateway.service import CallService
from cluster.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from cluster.gateway.resume_tokens.tokens import ResumeTokens


@dataclass(frozen=True, slots=True)
class Kind:
    """What differs between chat and completion."""

    chunk: Callable[[Call, Sequence[Piece], int], Message]
    response: Callable[[Call, Sequence[Piece]], Message]
    progress: Callable[[Call, pb.Progress], Message]
    text: Callable[[bytes, str, int], bytes]


CHAT = Kind(
    codec.chat_chunk,
    codec.chat_response,
    lambda call, progress: pb.ChatChunk(id=call.shown_id, model=call.model, progress=progress),
    codec.chat_text,
)
COMPLETE = Kind(
    codec.complete_chunk,
    codec.complete_response,
    lambda call, progress: pb.CompleteChunk(id=call.shown_id, model=call.model, progress=progress),
    codec.complete_text,
)


class GrpcEncoder:
    """A call's pieces as serialized chunks; see relay.Voice."""

    __slots__ = ("_call", "_head", "_kind", "_offset", "_service", "ended", "plain")

    def __init__(self, kind: Kind, call: Call, service: CallService) -> None:
        self.ended = False
        self._kind = kind
        self._call = call
        self._service = service
        self._head = pb.ChatChunk(id=call.shown_id, model=call.model).SerializeToString()  # CompleteChunk's is the same
        self._offset = 0
        self.plain = len(call.sequences) == 1

    def text(self, text: str) -> bytes:
        """See relay.Voice."""
        self._offset += 1
        return self._kind.text(self._head, text, self._offset)

    def begin(self) -> bytes:
        """A chunk that has nothing to tell yet."""
        self._offset += 1
        return codec.empty_chunk(self._head, self._offset)

    def take(self) -> bytes:
        """See relay.Voice."""
        call = self._call
        if (text := call.take_text()) is not None:
            return self.text(text) if text else b""
        pieces = call.take()
        if pieces:
            return self._told(pieces)
        if call.silent:  # after keepalive_s without text; held-back text alone says nothing
            return self._waits()
        return b""

    def _told(self, pieces: Sequence[Piece]) -> bytes:
        self._offset += 1
        self.ended = self._call.told
        return self._kind.chunk(self._call, pieces, self._offset).SerializeToString()

    def _waits(self) -> bytes:
        self._call.silent = False
        progress = codec.progress_pb(self._service.progress(self._call))
        return self._kind.progress(self._call, progress).SerializeToString()


class ResumableEncoder(GrpcEncoder):
    """Of a call whose chunks carry resume tokens."""

    __slots__ = ("_tickets", "_wraps")

    def __init__(self, kind: Kind, call: Call, service: CallService, tickets: ResumeTokens, bare: bool) -> None:
        super().__init__(kind, call, service)
        self._tickets = tickets
        self._offset = tickets.number
        self._wraps = call.continues and not bare

    def text(self, text: str) -> bytes:
        """See relay.Voice."""
        token = self._tickets.text(text)
        return self._wrapped(codec.with_token(super().text(text), token, self._tickets.whole))

    def begin(self) -> bytes:
        """A chunk with a token alone: the call goes on from here, and from nowhere before."""
        return self._wrapped(codec.with_token(super().begin(), *self._token(())))

    def _told(self, pieces: Sequence[Piece]) -> bytes:
        chunk = super()._told(pieces)
        return self._wrapped(chunk if self.ended else codec.with_token(chunk, *self._token(pieces)))

    def _token(self, pieces: Sequence[Piece]) -> tuple[bytes, bool]:
        return self._tickets.chunk(pieces), self._tickets.whole

    def _waits(self) -> bytes:
        return self._wrapped(super()._waits())

    def _wrapped(self, chunk: bytes) -> bytes:
        return codec.resumed(self._kind is CHAT, chunk) if self._wraps else chunk


def voice_of(kind: Kind, call: Call, service: CallService, bare: bool = False) -> GrpcEncoder:
    """A call's. `bare`: chunks of one that goes on are no ResumeChunks."""
    return (
        GrpcEncoder(kind, call, service)
        if call.resume_tokens is None
        else ResumableEncoder(kind, call, service, call.resume_tokens, bare)
    )
