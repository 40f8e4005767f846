"""Program: one helper of an EncodingPool. Its standard input is a socket: a bundle first, then job after job.

Every message has its length before it. A job is a pickle that only the gateway can have written: the socket has no
name and no other end. Ends with the gateway, or after IDLE_S without a job.
"""

from __future__ import annotations

import os
import pickle
import socket
from typing import Final

from cluster.gateway.text.pool_wire import FAILED, HEAD

IDLE_S: Final = 600.0


def _read(connection: socket.socket) -> bytearray | None:
    """One message; None at the end."""
    head = _exactly(connection, HEAD.size)
    return None if head is None else _exactly(connection, HEAD.unpack(head)[0])


def _exactly(connection: socket.socket, size: int) -> bytearray | None:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            return None
        view = view[count:]
    return data


def serve(connection: socket.socket) -> None:
    """Until the gateway closes its end, or has had nothing to do for IDLE_S."""
    from cluster.api.bundle import Bundle
    from cluster.gateway.text.tokenizer import TextModel

    packed = _read(connection)
    if packed is None:
        return
    model = TextModel.from_bundle(Bundle.unpack(bytes(packed)))
    del packed
    while (job := _read(connection)) is not None:
        try:
            method, positional, named = pickle.loads(job)  # noqa: S301 - from the gateway alone
            ids = memoryview(getattr(model, method)(*positional, **named)).cast("B")
        except Exception:  # whatever it is, the gateway meets it itself and tells its caller
            connection.sendall(HEAD.pack(FAILED))
            continue
        connection.sendall(HEAD.pack(len(ids)))
        connection.sendall(ids)


def main() -> None:
    """Serve the socket that is standard input."""
    connection = socket.socket(fileno=os.dup(0))
    connection.settimeout(IDLE_S)
    try:
        serve(connection)
    except OSError:  # idle for long, or the gateway is gone
        return


if __name__ == "__main__":
    main()
