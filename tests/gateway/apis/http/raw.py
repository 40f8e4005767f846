"""Reading from a server that may close the connection while the client still sends."""

from __future__ import annotations

import asyncio


async def read_all(reader: asyncio.StreamReader) -> bytes:
    """Return everything that is received until the connection ends. A reset counts as the end, because a server that
    closes with unread bytes sends one. A single `reader.read()` would lose the bytes received before the reset."""
    received = bytearray()
    try:
        while data := await reader.read(1 << 20):
            received += data
    except ConnectionResetError:
        pass
    return bytes(received)
