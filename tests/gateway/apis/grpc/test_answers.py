"""Messages that the gateway serializes by hand are identical to the messages that protobuf serializes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.apis.grpc import answers as codec
from cluster.gateway.apis.grpc.chunk_encoders import CHAT, SessionEncoder
from cluster.v1 import inference_pb2 as pb

texts = st.one_of(st.text(min_size=1), st.text(min_size=120, max_size=300), st.just("é" * 20_000))
offsets = st.integers(1, 2**63)


@given(st.text(), st.text(), texts, offsets)
def test_text_chunks_by_hand(call_id: str, model: str, text: str, offset: int) -> None:
    """Text chunks of chat and completion that are serialized by hand equal protobuf's byte for byte, at all lengths."""
    head = pb.ChatChunk(id=call_id, model=model).SerializeToString()
    assert head == pb.CompleteChunk(id=call_id, model=model).SerializeToString()
    chat = pb.ChatChunk(
        id=call_id, model=model, choices=[pb.ChoiceDelta(delta=pb.Message(content=text))], offset=offset
    )
    assert codec.chat_text(head, text, offset) == chat.SerializeToString()
    complete = pb.CompleteChunk(id=call_id, model=model, choices=[pb.CompleteChoice(text=text)], offset=offset)
    assert codec.complete_text(head, text, offset) == complete.SerializeToString()


@given(st.integers(0, 2**32 - 1), texts)
def test_session_events_by_hand(call_id: int, text: str) -> None:
    """Events of a session that are serialized by hand equal protobuf's byte for byte, as elements of SessionEvents."""
    call: Any = SimpleNamespace(shown_id="c", shown_model="m", sequences=[None], output=None)
    encoder = SessionEncoder(CHAT, call, cast(Any, None), call_id, bytes)
    event = pb.SessionEvent(call_id=call_id, text=text)
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
