"""Sender of large data from a gateway to one worker. Long prompts and chats are sent in chunks on a stream of their own
(Bulk), so that no large message delays a token."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from cluster.link.v1 import link_pb2 as pb
from cluster.wire.dial import CHUNK_BYTES
from cluster.wire.rendering import INLINE_CHAT_BYTES

TURN_PROMPT_BYTES: Final = 32_768
"""Size in bytes above which a prompt is sent on the Bulk stream."""


class BulkSender:
    """The Bulk stream of one link. Until the worker has opened this stream, large data is sent in the ordinary messages
    of the link."""

    def __init__(self) -> None:
        self._blobs: asyncio.Queue[pb.Blob] | None = None

    def open(self, blobs: asyncio.Queue[pb.Blob]) -> None:
        """Send all further chunks through this queue, because the worker has opened its Bulk stream."""
        self._blobs = blobs

    def extract_prompt(self, message: pb.Submit) -> Sequence[pb.Blob]:
        """Take a long prompt out of a Submit message and put a key in its place. Returns the chunks of the prompt under
        this key; the caller must `send` them before the message. Returns no chunks for a short prompt."""
        if self._blobs is None or len(message.prompt_ids) <= TURN_PROMPT_BYTES:
            return ()
        key, data = f"prompt:{message.slot}:{message.attempt}", message.prompt_ids
        message.ClearField("prompt_ids")
        message.prompt_blob = key
        return _chunks(key, data)

    def send_chat(self, render: pb.Render) -> None:
        """If the chat in a Render message is long, send the chat in chunks, and replace it in the message by the key of
        the chunks."""
        if self._blobs is not None and len(render.chat) > INLINE_CHAT_BYTES:
            key, data = f"chat:{render.number}", render.chat
            render.ClearField("chat")
            render.chat_blob = key
            self.send(_chunks(key, data))

    def send(self, chunks: Sequence[pb.Blob]) -> None:
        """Send chunks that were extracted from a message."""
        if self._blobs is not None:
            for chunk in chunks:
                self._blobs.put_nowait(chunk)


def _chunks(key: str, data: bytes) -> Sequence[pb.Blob]:
    starts = range(0, len(data), CHUNK_BYTES)
    return [pb.Blob(key=key, data=data[at : at + CHUNK_BYTES], last=at + CHUNK_BYTES >= len(data)) for at in starts]
