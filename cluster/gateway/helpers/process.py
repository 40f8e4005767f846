"""Program of one process of a HelperPool. The standard input of the process is a socket, on which the setup and then
the jobs arrive.

A job that exceeds its CPU limit ends the process by a signal, even inside native code. The pool then starts another
process. A process also ends with the gateway, or after IDLE_S without a job.
"""

from __future__ import annotations

import os
import signal
import socket
from typing import Any, Final

from cluster.api.outcomes import CallError
from cluster.gateway.helpers.wire import FAILED, OK, OUT_OF_TIME, REFUSED, receive, send

IDLE_S: Final = 600.0


def serve(connection: socket.socket) -> None:
    """Run jobs from the socket until the socket is closed or has been idle for IDLE_S."""
    worker = _worker(*receive(connection))
    while True:
        cpu_s, method, positional, named = receive(connection)
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        answer = _answer(worker, method, positional, named)
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(connection, answer)
        del positional, named, answer  # may be megabytes, which would stay until the next job


def _worker(kind: str, setup: bytes | bytearray) -> object:
    if kind == "text":
        from cluster.gateway.text.bundle_files import BundleFiles
        from cluster.gateway.text.text_codec import TextCodec
        from cluster.wire.bundle import Bundle

        return TextCodec(BundleFiles(Bundle.unpack(bytes(setup))))
    from cluster.gateway.apis.body_parser import BodyReader

    return BodyReader()


def _answer(worker: object, method: str, positional: tuple[Any, ...], named: dict[str, Any]) -> tuple[str, Any]:
    try:
        return OK, getattr(worker, method)(*positional, **named)
    except CallError as error:
        return REFUSED, error
    except BaseException as error:  # a panic of Rust code is not an Exception
        return FAILED, f"{type(error).__name__}: {error}"[:500]


def main() -> None:
    """Run the jobs that arrive on the socket at standard input."""
    signal.signal(OUT_OF_TIME, signal.SIG_DFL)
    connection = socket.socket(fileno=os.dup(0))
    connection.settimeout(IDLE_S)
    try:
        serve(connection)
    except (OSError, EOFError):  # idle for IDLE_S, or the gateway has ended
        return


if __name__ == "__main__":
    main()
