"""Long prompts and chats are sent in chunks, once the worker has opened its Bulk stream."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cluster.gateway.links.bulk_sender import TURN_PROMPT_BYTES, BulkSender
from cluster.link.v1 import link_pb2 as pb
from cluster.wire.dial import CHUNK_BYTES
from cluster.wire.rendering import INLINE_CHAT_BYTES

LONG = bytes(range(251)) * (2 * CHUNK_BYTES // 251 + 1)


def joined(chunks: Sequence[pb.Blob], key: str) -> bytes:
    """Return the joined data of the chunks. Asserts that all have this key, and that at most the final one is marked as
    last."""
    assert {chunk.key for chunk in chunks} == {key}
    assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    return b"".join(chunk.data for chunk in chunks)


def sent(blobs: asyncio.Queue[pb.Blob]) -> list[pb.Blob]:
    """Return the chunks that were sent."""
    return [blobs.get_nowait() for _ in range(blobs.qsize())]


def test_everything_is_inline_before_the_stream() -> None:
    """As long as the worker has no Bulk stream, a long prompt stays inside its Submit message and a long chat inside
    its Render message."""
    bulk, submit, render = BulkSender(), pb.Submit(prompt_ids=LONG), pb.Render(chat=LONG)
    assert not bulk.extract_prompt(submit)
    bulk.send_chat(render)
    assert (submit.prompt_ids, submit.prompt_blob, render.chat, render.chat_blob) == (LONG, "", LONG, "")


def test_long_data_are_sent_in_chunks() -> None:
    """A long prompt and a long chat are sent in chunks. The Submit or Render message then holds a reference to the
    chunks in place of the data."""
    bulk, blobs = BulkSender(), asyncio.Queue[pb.Blob]()
    bulk.open(blobs)
    submit = pb.Submit(slot=7, attempt=2, prompt_ids=LONG)
    chunks = bulk.extract_prompt(submit)
    assert not submit.prompt_ids
    assert joined(chunks, submit.prompt_blob) == LONG
    assert blobs.empty(), "the prompt is sent only once the request is counted"
    bulk.send(chunks)
    assert sent(blobs) == list(chunks)
    render = pb.Render(number=3, chat=LONG)
    bulk.send_chat(render)
    assert not render.chat
    assert joined(sent(blobs), render.chat_blob) == LONG


def test_short_data_stay_inline() -> None:
    """A prompt and a chat of the largest inline size are sent within their own messages."""
    bulk, blobs = BulkSender(), asyncio.Queue[pb.Blob]()
    bulk.open(blobs)
    assert not bulk.extract_prompt(pb.Submit(prompt_ids=b"x" * TURN_PROMPT_BYTES))
    bulk.send_chat(pb.Render(chat=b"x" * INLINE_CHAT_BYTES))
    assert blobs.empty()
