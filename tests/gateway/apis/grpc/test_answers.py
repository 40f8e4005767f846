"""Messages that the gateway serializes by hand are identical to the messages that protobuf serializes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.apis.grpc import answers as codec
from cluster.gateway.apis.grpc.chunk_encoders import CHAT, COMPLETE, GrpcEncoder, Kind, SessionEncoder
from cluster.v1 import inference_pb2 as pb

texts = st.one_of(st.text(min_size=1), st.text(min_size=120, max_size=300), st.just("é" * 20_000))
offsets = st.integers(1, 2**63)


def encoder_of(kind: Kind, call_id: int | None = None) -> GrpcEncoder:
    """Return the encoder of a call with one output. With `call_id`, the call belongs to a session."""
    output = SimpleNamespace(pop_pieces=list)
    sequences = [SimpleNamespace(logprob_texts=None)]
    call: Any = SimpleNamespace(shown_id="c", shown_model="m", sequences=sequences, output=output)
    if call_id is None:
        return GrpcEncoder(kind, call, cast(Any, None))
    return SessionEncoder(kind, call, cast(Any, None), call_id, bytes)


@given(st.lists(texts, max_size=5))
def test_text_chunks_by_hand(some: list[str]) -> None:
    """Hand-serialized text chunks of chat and completion equal protobuf's, byte for byte. This holds at all lengths,
    and for several texts of equal length."""
    chat_encoder, complete_encoder = encoder_of(CHAT), encoder_of(COMPLETE)
    for offset, text in enumerate([*some, *some], 1):
        delta = pb.ChoiceDelta(delta=pb.Message(content=text))
        chat = pb.ChatChunk(id="c", model="m", choices=[delta], offset=offset)
        assert chat_encoder.encode_text(text) == chat.SerializeToString()
        choice = pb.CompleteChoice(text=text)
        complete = pb.CompleteChunk(id="c", model="m", choices=[choice], offset=offset)
        assert complete_encoder.encode_text(text) == complete.SerializeToString()


@given(offsets)
def test_offsets_by_hand(offset: int) -> None:
    """The function that serializes the offset of a chunk gives the same bytes as protobuf, for any offset."""
    assert codec.offset_field(offset) == pb.ChatChunk(offset=offset).SerializeToString()
    assert codec.offset_field(offset) == pb.CompleteChunk(offset=offset).SerializeToString()


@given(st.integers(0, 2**32 - 1), texts)
def test_session_events_by_hand(call_id: int, text: str) -> None:
    """Hand-serialized events of a session equal protobuf's elements of SessionEvents, byte for byte."""
    encoder = encoder_of(CHAT, call_id)
    event = pb.SessionEvent(call_id=call_id, text=text)
    for _ in range(2):
        assert encoder.encode_text(text) == pb.SessionEvents(events=[event]).SerializeToString()
    for is_chat in (True, False):
        chunk: Any = pb.ChatChunk(id=text, offset=1) if is_chat else pb.CompleteChunk(id=text, offset=1)
        event = (
            pb.SessionEvent(call_id=call_id, chat=chunk)
            if is_chat
            else pb.SessionEvent(call_id=call_id, complete=chunk)
        )
        expected = pb.SessionEvents(events=[event]).SerializeToString()
        assert codec.event_chunk(call_id, is_chat, chunk.SerializeToString()) == expected
