"""HTTP/2 client for attacks. The client blocks, sends any bytes, and records the frames that the server sends."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from hpack import Encoder
from hyperframe.frame import DataFrame, HeadersFrame, SettingsFrame, WindowUpdateFrame

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SERVICE: Final = "/cluster.v1.Inference/"
HEALTH: Final = "/grpc.health.v1.Health/Check"
HEAD_BYTES: Final = 9
DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY = 0, 1, 3, 4, 7
CONNECT_S: Final = 10.0


class Attacker:
    """An attacking connection. `received` counts frames by type."""

    def __init__(self, address: str, key: str = "") -> None:
        """Connect. With a key, make a call that succeeds, so that the connection belongs to a tenant."""
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), CONNECT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.received: dict[int, int] = {}
        self.ended = False
        self._encoder = Encoder()
        self._buffer = bytearray()
        self._next = 1
        self._key = key
        settings = SettingsFrame(0, settings={SettingsFrame.INITIAL_WINDOW_SIZE: 1 << 20})
        self.send(PREFACE + settings.serialize() + WindowUpdateFrame(0, 1 << 30).serialize())
        self.wait(lambda: self.received.get(SETTINGS, 0) >= 1)
        self.send(SettingsFrame(0, flags=("ACK",)).serialize())
        if key:
            stream = self.open("ListModels")
            self.send(stream + self.message(self.last, b"", end=True))
            self.wait(lambda: self.received.get(HEADERS, 0) >= 2)

    @property
    def last(self) -> int:
        """Id of the last stream that was opened."""
        return self._next - 2

    def open(
        self, method: str, more: Sequence[tuple[str, str]] = (), *, end: bool = False, verb: str = "POST"
    ) -> bytes:
        """Return the HEADERS frame of a new call, to be sent later. `method`: the name of a method of our gRPC service,
        or a whole path that begins with a slash. `more`: further header fields."""
        path = method if method.startswith("/") else SERVICE + method
        fields = [(":method", verb), (":scheme", "http"), (":path", path), (":authority", "a")]
        fields += [("content-type", "application/grpc"), ("te", "trailers"), *more]
        if self._key:
            fields.append(("authorization", f"Bearer {self._key}"))
        return self.head(self._encoder.encode(fields), end=end)

    def head(self, block: bytes, *, end: bool = False) -> bytes:
        """Return the HEADERS frame of a new stream with this header block."""
        flags = ("END_HEADERS", "END_STREAM") if end else ("END_HEADERS",)
        frame = HeadersFrame(self._next, block, flags=flags)
        self._next += 2
        return frame.serialize()

    @staticmethod
    def message(stream_id: int, data: bytes, *, end: bool = False) -> bytes:
        """Return the DATA frame that holds the complete gRPC message `data`. `end`: whether the frame ends the
        stream."""
        framed = b"\x00" + len(data).to_bytes(4, "big") + data
        return DataFrame(stream_id, framed, flags=("END_STREAM",) if end else ()).serialize()

    def send(self, data: bytes) -> bool:
        """Send all of the data, and read what arrives meanwhile; return False once the server has closed the
        connection.
        """
        view = memoryview(data)
        while view and not self.ended:
            try:
                view = view[self.socket.send(view) :]
            except OSError:
                self.ended = True
            self.read(0.0)
        return not self.ended

    def send_within(self, data: bytes, within_s: float) -> int:
        """Send as much of the data as the server accepts within `within_s`; return the number of bytes sent."""
        self.socket.settimeout(within_s)
        with suppress(OSError):
            return self.socket.send(data)
        return 0

    def read(self, wait_s: float) -> None:
        """Read once from the socket, waiting at most `wait_s`."""
        try:
            self.socket.settimeout(wait_s)
            data = self.socket.recv(1 << 20)
            self.ended = self.ended or not data
        except (BlockingIOError, TimeoutError):
            return
        except OSError:
            self.ended = True
            return
        finally:
            self.socket.settimeout(CONNECT_S)
        self._buffer += data
        while len(self._buffer) >= HEAD_BYTES:
            end = HEAD_BYTES + int.from_bytes(self._buffer[:3], "big")
            if len(self._buffer) < end:
                return
            kind = self._buffer[3]
            self.received[kind] = self.received.get(kind, 0) + 1
            self.ended = self.ended or kind == GOAWAY
            del self._buffer[:end]

    def wait(self, holds: Callable[[], bool], within_s: float = CONNECT_S) -> None:
        """Read until `holds` is true. Raises TimeoutError, or ConnectionError if the server closes the connection."""
        deadline = time.monotonic() + within_s
        while not holds():
            if self.ended:
                raise ConnectionError("the server closed the connection")
            if time.monotonic() > deadline:
                raise TimeoutError("the expected response did not arrive in time")
            self.read(0.2)

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()
