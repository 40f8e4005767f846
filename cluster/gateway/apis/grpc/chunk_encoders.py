"""Chunk encoders of the gRPC API. An encoder turns the pieces of a call into serialized chunks. The chunks of a
resumable call carry resume tokens."""

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
    """The functions that build the messages of one kind of call: chat or completion."""

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
    """Encodes the pieces of a call as serialized chunks. Implements calls.stream_writer.ChunkEncoder."""

    __slots__ = ("_call", "_head", "_kind", "_offset", "_service", "ended", "plain")

    def __init__(self, kind: Kind, call: Call, service: CallService) -> None:
        self.ended = False
        self._kind = kind
        self._call = call
        self._service = service
        self._head = pb.ChatChunk(id=call.shown_id, model=call.model).SerializeToString()  # same bytes in CompleteChunk
        self._offset = 0
        self.plain = len(call.sequences) == 1

    def encode_text(self, text: str) -> bytes:
        """See ChunkEncoder."""
        self._offset += 1
        return self._kind.text(self._head, text, self._offset)

    def begin(self) -> bytes:
        """Return an empty first chunk."""
        self._offset += 1
        return codec.empty_chunk(self._head, self._offset)

    def encode_new(self) -> bytes:
        """See ChunkEncoder."""
        call = self._call
        if (text := call.pop_text()) is not None:
            return self.encode_text(text) if text else b""
        pieces = call.pop_pieces()
        if pieces:
            return self._pieces_chunk(pieces)
        if call.silent:  # after keepalive_s without text that can be sent
            return self._progress_chunk()
        return b""

    def _pieces_chunk(self, pieces: Sequence[Piece]) -> bytes:
        self._offset += 1
        self.ended = self._call.end_delivered
        return self._kind.chunk(self._call, pieces, self._offset).SerializeToString()

    def _progress_chunk(self) -> bytes:
        self._call.silent = False
        progress = codec.progress_pb(self._service.keepalives.progress(self._call))
        return self._kind.progress(self._call, progress).SerializeToString()


class ResumableEncoder(GrpcEncoder):
    """Encodes the pieces of a resumable call as serialized chunks that carry resume tokens."""

    __slots__ = ("_resume_tokens", "_wraps")

    def __init__(
        self, kind: Kind, call: Call, service: CallService, resume_tokens: ResumeTokens, unwrapped: bool
    ) -> None:
        super().__init__(kind, call, service)
        self._resume_tokens = resume_tokens
        self._offset = resume_tokens.number
        self._wraps = call.is_resumed and not unwrapped

    def encode_text(self, text: str) -> bytes:
        """See ChunkEncoder."""
        token = self._resume_tokens.text(text)
        return self._wrapped(codec.with_token(super().encode_text(text), token, self._resume_tokens.whole))

    def begin(self) -> bytes:
        """Return a first chunk that holds only a resume token. The resume tokens that were sent before this chunk can
        no longer be used."""
        return self._wrapped(codec.with_token(super().begin(), *self._token(())))

    def _pieces_chunk(self, pieces: Sequence[Piece]) -> bytes:
        chunk = super()._pieces_chunk(pieces)
        return self._wrapped(chunk if self.ended else codec.with_token(chunk, *self._token(pieces)))

    def _token(self, pieces: Sequence[Piece]) -> tuple[bytes, bool]:
        return self._resume_tokens.chunk(pieces), self._resume_tokens.whole

    def _progress_chunk(self) -> bytes:
        return self._wrapped(super()._progress_chunk())

    def _wrapped(self, chunk: bytes) -> bytes:
        return codec.resumed(self._kind is CHAT, chunk) if self._wraps else chunk


def encoder_for(kind: Kind, call: Call, service: CallService, unwrapped: bool = False) -> GrpcEncoder:
    """Return the encoder for a call. `unwrapped`: do not wrap the chunks of a resumed call in ResumeChunks."""
    return (
        GrpcEncoder(kind, call, service)
        if call.resume_tokens is None
        else ResumableEncoder(kind, call, service, call.resume_tokens, unwrapped)
    )
