"""Messages that the gateway serializes by hand are identical to the messages that protobuf serializes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.apis.grpc import answers as codec
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
