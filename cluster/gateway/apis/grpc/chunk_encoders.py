"""Chunk encoders of the gRPC API. An encoder turns the pieces of a call into serialized chunks. The chunks of a
resumable call carry resume tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from google.protobuf.message import Message

from cluster.gateway.apis.grpc import answers as codec
from cluster.gateway.apis.grpc.answers import OFFSETS
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.keepalive import ProgressOf
from cluster.gateway.calls.logprob_cuts import LogprobCuts
from cluster.gateway.calls.sequences.pieces import Piece
from cluster.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from cluster.gateway.resume_tokens.tokens import ResumeTokens

_KNOWN_OFFSETS = len(OFFSETS)

Wrap = Callable[[bytes], bytes]
"""Function that wraps a serialized chunk in the serialized message that is sent, for example a ResumeChunk."""


@dataclass(frozen=True, slots=True)
class Kind:
    """The functions that build the messages of one kind of call: chat or completion."""

    chunk: Callable[[Call, Sequence[Piece], int], Message]
    response: Callable[[Call, Sequence[Piece]], pb.ChatResponse | pb.CompleteResponse]
    progress: Callable[[Call, pb.Progress], Message]
    text_start: Callable[[int], bytes]
    """Function that returns the bytes directly before the text in a chunk that holds only a text. The argument is the
    size of the text in bytes."""
    text_starts: Sequence[bytes]
    """The results of `text_start` for the smallest sizes."""


CHAT = Kind(
    codec.chat_chunk,
    codec.chat_response,
    lambda call, progress: pb.ChatChunk(id=call.shown_id, model=call.shown_model, progress=progress),
    codec.chat_text_start,
    codec.CHAT_TEXT_STARTS,
)
COMPLETE = Kind(
    codec.complete_chunk,
    codec.complete_response,
    lambda call, progress: pb.CompleteChunk(id=call.shown_id, model=call.shown_model, progress=progress),
    codec.complete_text_start,
    codec.COMPLETE_TEXT_STARTS,
)


class GrpcEncoder:
    """Encoder of a call's pieces as serialized chunks. Implements calls.stream_writer.ChunkEncoder."""

    __slots__ = (
        "_call",
        "_head",
        "_kind",
        "_offset",
        "_output",
        "_pop_pieces",
        "_progress",
        "_text_starts",
        "ended",
        "plain",
    )

    def __init__(self, kind: Kind, call: Call, progress: ProgressOf) -> None:
        self.ended = False
        self._kind = kind
        self._call = call
        self._output = call.output
        has_logprobs = call.sequences[0].logprob_texts is not None
        self._pop_pieces = LogprobCuts(call).pop_pieces if has_logprobs else call.output.pop_pieces
        self._progress = progress
        head = pb.ChatChunk(id=call.shown_id, model=call.shown_model)
        self._head = head.SerializeToString()  # same bytes in CompleteChunk
        self._offset = 0
        self._text_starts = kind.text_starts
        self.plain = len(call.sequences) == 1

    def encode_text(self, text: str) -> bytes:
        """Return the chunk of the next token, with `text` and no other data. Implements ChunkEncoder."""
        self._offset = offset = self._offset + 1
        data = text.encode()
        size = len(data)
        starts = self._text_starts
        start = starts[size] if size < len(starts) else self._kind.text_start(size)
        return self._head + start + data + (OFFSETS[offset] if offset < _KNOWN_OFFSETS else codec.offset_field(offset))

    def begin(self) -> bytes:
        """Return an empty first chunk, for a resumed stream."""
        self._offset += 1
        return codec.empty_chunk(self._head, self._offset)

    def encode_new(self) -> bytes:
        """Return a chunk with everything that is new in the call, or a chunk with the call's progress if a keep-alive
        is due; b"" if neither is to be sent. Implements ChunkEncoder."""
        output = self._output
        if (text := output.pop_text()) is not None:
            return self.encode_text(text) if text else b""
        pieces = self._pop_pieces()
        if pieces:
            return self._pieces_chunk(pieces)
        if output.pop_keepalive():  # after keepalive_s without text that can be sent
            return self._progress_chunk()
        return b""

    def _pieces_chunk(self, pieces: Sequence[Piece]) -> bytes:
        self._offset += 1
        self.ended = self._output.end_delivered
        return self._kind.chunk(self._call, pieces, self._offset).SerializeToString()

    def _progress_chunk(self) -> bytes:
        progress = codec.progress_pb(self._progress(self._call))
        return self._kind.progress(self._call, progress).SerializeToString()


class SessionEncoder(GrpcEncoder):
    """Encodes the pieces of a call in a session as events of the session. A piece that holds only a text becomes an
    event with this text. Any other piece becomes an event with a chunk."""

    __slots__ = ("_wrap", "event_head")

    def __init__(self, kind: Kind, call: Call, progress: ProgressOf, call_id: int, wrap: Wrap) -> None:
        super().__init__(kind, call, progress)
        self.event_head = codec.event_head(call_id)
        """See codec.text_event."""
        self._wrap = wrap

    def encode_text(self, text: str) -> bytes:
        """Return the event for a token that has only a text. Implements ChunkEncoder."""
        self._offset += 1
        return b"".join(codec.text_event(self.event_head, text))

    def count_texts(self, number: int) -> None:
        """Add `number` texts to the offset of later chunks, because these texts were sent without a call of
        `encode_text`."""
        self._offset += number

    def _pieces_chunk(self, pieces: Sequence[Piece]) -> bytes:
        return self._wrap(super()._pieces_chunk(pieces))

    def _progress_chunk(self) -> bytes:
        return self._wrap(super()._progress_chunk())


class ResumableEncoder(GrpcEncoder):
    """Encodes the pieces of a resumable call as serialized chunks that carry resume tokens."""

    __slots__ = ("_resume_tokens", "_wrap")

    def __init__(
        self, kind: Kind, call: Call, progress: ProgressOf, resume_tokens: ResumeTokens, wrap: Wrap | None
    ) -> None:
        super().__init__(kind, call, progress)
        self._resume_tokens = resume_tokens
        self._offset = resume_tokens.number
        self._wrap = wrap

    def encode_text(self, text: str) -> bytes:
        """Return the chunk of a token that adds `text` and has nothing else to report. The chunk contains a resume
        token. Implements ChunkEncoder."""
        token = self._resume_tokens.text(text)
        return self._wrapped(codec.with_token(super().encode_text(text), token, self._resume_tokens.whole))

    def begin(self) -> bytes:
        """Return the first chunk of a resumed stream, which holds only a new resume token. The resume tokens of the
        earlier stream can no longer be used."""
        return self._wrapped(codec.with_token(super().begin(), *self._token(())))

    def _pieces_chunk(self, pieces: Sequence[Piece]) -> bytes:
        chunk = super()._pieces_chunk(pieces)
        return self._wrapped(chunk if self.ended else codec.with_token(chunk, *self._token(pieces)))

    def _token(self, pieces: Sequence[Piece]) -> tuple[bytes, bool]:
        return self._resume_tokens.chunk(pieces), self._resume_tokens.whole

    def _progress_chunk(self) -> bytes:
        return self._wrapped(super()._progress_chunk())

    def _wrapped(self, chunk: bytes) -> bytes:
        return chunk if self._wrap is None else self._wrap(chunk)


def encoder_for(kind: Kind, call: Call, progress: ProgressOf) -> GrpcEncoder:
    """Return the encoder for a call that has its own stream, outside of a session."""
    if call.resume_tokens is None:
        return GrpcEncoder(kind, call, progress)
    wrap = partial(codec.resumed, kind is CHAT) if call.is_resumed else None
    return ResumableEncoder(kind, call, progress, call.resume_tokens, wrap)


def session_encoder_for(kind: Kind, call: Call, progress: ProgressOf, call_id: int) -> GrpcEncoder:
    """Return the encoder for a call in a session. It encodes chunks as events of the session. `call_id`: id of the call
    in the session."""
    wrap = partial(codec.event_chunk, call_id, kind is CHAT)
    if call.resume_tokens is None:
        return SessionEncoder(kind, call, progress, call_id, wrap)
    return ResumableEncoder(kind, call, progress, call.resume_tokens, wrap)
