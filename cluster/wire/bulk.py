"""Bulk stream of a link, which sends large blobs in chunks. Each blob has a key. Workers send tokenizer bundles, and
gateways send long prompts.
"""

from __future__ import annotations

import asyncio

import grpc

from cluster.link.v1 import link_pb2 as pb
from cluster.wire.bundle import Bundle
from cluster.wire.dial import CHUNK_BYTES, LinkEnded, read, wait_first

BlobCall = grpc.aio.StreamStreamCall[pb.Blob, pb.Blob]


class Prompts:
    """Prompts received on the bulk stream, by key. A prompt may arrive before or after the request (Submit) that names
    its key."""

    def __init__(self) -> None:
        self._parts: dict[str, bytearray] = {}
        self._whole: dict[str, asyncio.Future[bytes]] = {}

    def _future(self, key: str) -> asyncio.Future[bytes]:
        return self._whole.setdefault(key, asyncio.get_running_loop().create_future())

    def add(self, blob: pb.Blob) -> None:
        """Add one chunk of a prompt."""
        self._parts.setdefault(blob.key, bytearray()).extend(blob.data)
        if blob.last:
            whole = self._future(blob.key)
            if not whole.done():
                whole.set_result(bytes(self._parts.pop(blob.key)))

    async def pop_prompt(self, key: str) -> bytes:
        """Wait until the prompt `key` is complete, then remove and return it."""
        try:
            return await self._future(key)
        finally:
            self._whole.pop(key, None)


async def serve_bulk(call: BlobCall, hello: pb.Blob, prompts: Prompts, blobs: asyncio.Queue[pb.Blob]) -> None:
    """Run a bulk stream: send `hello` and the queued `blobs`, and add received prompts to `prompts`. Raises LinkEnded
    when the stream is closed."""
    await call.write(hello)
    parts = [asyncio.create_task(_read(call, prompts)), asyncio.create_task(_write(call, blobs))]
    try:
        await wait_first(parts)
    finally:
        for part in parts:
            part.cancel()
        await asyncio.gather(*parts, return_exceptions=True)
        parts.clear()
        del part
        call.cancel()


async def _read(call: BlobCall, prompts: Prompts) -> None:
    while (blob := await read(call)) is not None:
        prompts.add(blob)
    raise LinkEnded("the gateway closed the bulk stream")


async def _write(call: BlobCall, blobs: asyncio.Queue[pb.Blob]) -> None:
    while True:
        await call.write(await blobs.get())


async def send_bundle(blobs: asyncio.Queue[pb.Blob], digest: str, bundle: Bundle | None) -> None:
    """Queue the chunks of the tokenizer bundle with this digest. If `bundle` is None, this process does not have the
    bundle, and an error chunk is queued instead."""
    key = f"bundle:{digest}"
    if bundle is None:
        await blobs.put(pb.Blob(key=key, error="no such bundle here", last=True))
        return
    data = bundle.pack()
    for at in range(0, max(len(data), 1), CHUNK_BYTES):
        chunk = data[at : at + CHUNK_BYTES]
        await blobs.put(pb.Blob(key=key, data=chunk, last=at + CHUNK_BYTES >= len(data)))
