"""How a HelperPool and its processes speak: a pickle and the large buffers that it refers to, each with its length.

Only the two write here: the socket has no name and no other end. Buffers are bytes, arrays and PickleBuffers of any
size; they are sent and received in pieces, never copied into the pickle, so no step of an event loop is long.
"""

from __future__ import annotations

import pickle
import signal
import socket
import struct
from collections.abc import Sequence
from typing import Any, Final

HEAD: Final = struct.Struct("<QI")
"""Bytes of the pickle, and how many buffers follow it."""
SIZE: Final = struct.Struct("<Q")
PIECE_BYTES: Final = 1 << 20
"""Sent or received before the event loop turns to others."""
OK, REFUSED, FAILED = "ok", "refused", "failed"
"""What an answer is: a result, a CallError, or words about any other exception."""
OUT_OF_TIME: Final = signal.SIGPROF
"""Ends a process whose job has used all its CPU, by its default action."""
Parts = list["bytes | memoryview"]


def pack(value: object) -> Parts:
    """A value as parts to send, one after the other."""
    buffers: list[pickle.PickleBuffer] = []
    packed = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    parts: Parts = [HEAD.pack(len(packed), len(buffers)) + packed]
    for buffer in buffers:
        view = buffer.raw()
        parts += [SIZE.pack(view.nbytes), view]
    return parts


def unpack(packed: bytes | bytearray, buffers: Sequence[bytearray]) -> Any:
    """The value of a pickle and its buffers."""
    return pickle.loads(packed, buffers=buffers)  # noqa: S301 - written by the other end of a socket pair


def send(connection: socket.socket, value: object) -> None:
    """Send a value, and wait until it is sent."""
    for part in pack(value):
        connection.sendall(part)


def receive(connection: socket.socket) -> Any:
    """The next value. Raises EOFError once the other end is closed."""
    size, count = HEAD.unpack(_exactly(connection, HEAD.size))
    packed = _exactly(connection, size)
    buffers = [_exactly(connection, SIZE.unpack(_exactly(connection, SIZE.size))[0]) for _ in range(count)]
    return unpack(packed, buffers)


def _exactly(connection: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return data
