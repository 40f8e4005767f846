"""The protocol between a HelperPool and its processes. A message is a pickle, followed by the large buffers that the
pickle refers to. The pickle and each buffer are sent with their length.

Pickle is safe here, because the socket pair has no name, and only the pool and the helper process write to it. Buffers
are bytes, arrays and PickleBuffers of any size. Buffers are sent and received in pieces and never copied into the
pickle, so no step blocks the event loop for long.
"""

from __future__ import annotations

import pickle
import signal
import socket
import struct
from collections.abc import Sequence
from typing import Any, Final

HEAD: Final = struct.Struct("<QI")
"""Head of a message: the number of bytes in the pickle, and the number of buffers after the pickle."""
SIZE: Final = struct.Struct("<Q")
PIECE_BYTES: Final = 1 << 20
"""Number of bytes that are sent or received before other tasks of the event loop may run."""
OK, REFUSED, FAILED = "ok", "refused", "failed"
"""Kinds of an answer: a result, a CallError, and the text of any other exception."""
OUT_OF_TIME: Final = signal.SIGPROF
"""Signal that ends a helper process, by its default action, when a job exceeds the CPU limit."""
Job = tuple[str, tuple[Any, ...], dict[str, Any]]
"""A call of a method on the object that the helpers serve: the method's name, the arguments and the keyword
arguments."""
Parts = list["bytes | memoryview"]


def pack(value: object) -> Parts:
    """Encode a value into parts, which must be sent in order."""
    buffers: list[pickle.PickleBuffer] = []
    packed = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    parts: Parts = [HEAD.pack(len(packed), len(buffers)) + packed]
    for buffer in buffers:
        view = buffer.raw()
        parts += [SIZE.pack(view.nbytes), view]
    return parts


def unpack(packed: bytes | bytearray, buffers: Sequence[bytearray]) -> Any:
    """Decode a value from its pickle and its buffers."""
    return pickle.loads(packed, buffers=buffers)  # noqa: S301 - written by the other end of a socket pair


def send(connection: socket.socket, value: object) -> None:
    """Send a value. Blocks until the value is sent."""
    for part in pack(value):
        connection.sendall(part)


def receive(connection: socket.socket) -> Any:
    """Wait for the next value and return it. Raises EOFError when the other end is closed."""
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
