"""gRPC's length-prefixed messages, timeouts and metadata, as bytes on the wire.

Source: "gRPC over HTTP2" (PROTOCOL-HTTP2.md of the gRPC repository).
"""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from urllib.parse import quote

Metadata = tuple[tuple[str, str | bytes], ...]

# Names that are the protocol's, not the caller's.
_RESERVED = {"te", "content-type", "grpc-timeout", "grpc-encoding", "grpc-accept-encoding", "content-length"}
_TIMEOUT = re.compile(rb"^(\d{1,8})([HMSmun])$")
_UNIT_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
ENCODINGS = ("identity", "gzip", "deflate")
PREFIX_BYTES = 5
"""Of a message on the wire: its compressed flag and its length."""
UNCOPIED_BYTES = 65_536
INFLATE_BYTES = 65_536
"""Compressed bytes that are looked at together."""
_WBITS = {"gzip": 31, "deflate": 15}


class BadMessage(ValueError):
    """What arrived is no gRPC message, or a larger one than is taken. `too_large` tells which."""

    def __init__(self, why: str, too_large: bool = False) -> None:
        super().__init__(why)
        self.too_large = too_large


class Assembler:
    """Bytes of a stream become messages. Nothing larger than `max_bytes` is held."""

    __slots__ = ("_buffer", "_max_bytes")

    def __init__(self, max_bytes: int) -> None:
        self._buffer = bytearray()
        self._max_bytes = max_bytes

    def add(self, data: bytes) -> Iterator[tuple[bytes | bytearray, int, bool]]:
        """The messages that `data` completes, each with its bytes on the wire and whether it is compressed. Raises
        BadMessage."""
        self._buffer += data
        while len(self._buffer) >= PREFIX_BYTES:
            end = self.message_bytes
            if end - PREFIX_BYTES > self._max_bytes:
                raise BadMessage(
                    f"the message of {end - PREFIX_BYTES} bytes is larger than {self._max_bytes}, the most that is "
                    "taken",
                    too_large=True,
                )
            flag = self._buffer[0]
            if flag > 1:
                raise BadMessage(f"a message's compressed flag must be 0 or 1, not {flag}")
            if len(self._buffer) < end:
                return
            yield self._take(end), end, flag == 1

    def _take(self, end: int) -> bytes | bytearray:
        """The message that ends there. One that fills all that is held is not copied: 16 MB of fresh memory would hold
        the event loop for 5 to 10 ms."""
        if end == len(self._buffer) and end >= UNCOPIED_BYTES:
            whole, self._buffer = self._buffer, bytearray()
            del whole[:PREFIX_BYTES]
            return whole
        with memoryview(self._buffer) as held, held[PREFIX_BYTES:end] as part:
            message = bytes(part)
        del self._buffer[:end]
        return message

    def clear(self) -> None:
        """Drop what is held."""
        self._buffer.clear()

    @property
    def held_bytes(self) -> int:
        """Bytes of a message that is not whole yet."""
        return len(self._buffer)

    @property
    def message_bytes(self) -> int:
        """The size on the wire of the message that has begun; 0 before its prefix is here."""
        return PREFIX_BYTES + int.from_bytes(self._buffer[1:5], "big") if len(self._buffer) >= PREFIX_BYTES else 0

    @property
    def compressed(self) -> bool:
        """Whether the message that has begun is compressed."""
        return bool(self._buffer and self._buffer[0])


class Inflater:
    """One compressed message, decompressed a piece at a time to at most `max_bytes`."""

    def __init__(self, message: bytes | bytearray, encoding: str, max_bytes: int) -> None:
        """Raises BadMessage."""
        if encoding not in _WBITS:
            raise BadMessage(f"compressed flag 1 with grpc-encoding {encoding!r}")
        self._inflate = zlib.decompressobj(_WBITS[encoding])
        self._message = memoryview(message)
        self._at = 0
        self._max_bytes = max_bytes
        self._out = bytearray()

    def step(self, size: int) -> bytes | None:
        """Decompress at most INFLATE_BYTES, which may hold nothing at all, to at most `size` bytes more; the message,
        once it is whole. Raises BadMessage."""
        if not self._inflate.eof:
            self._feed(size)
            if len(self._out) > self._max_bytes:
                why = f"the message is larger than {self._max_bytes} bytes once decompressed"
                raise BadMessage(why, too_large=True)
        return bytes(self._out) if self._inflate.eof else None

    def _feed(self, size: int) -> None:
        piece: bytes | memoryview = self._inflate.unconsumed_tail
        if not piece:
            piece = self._message[self._at : self._at + INFLATE_BYTES]
            self._at += len(piece)
        if not piece:
            raise BadMessage("the message does not decompress: it is incomplete")
        try:
            self._out += self._inflate.decompress(piece, size)
        except zlib.error as error:
            raise BadMessage(f"the message does not decompress: {error}") from None


def timeout_s(value: bytes) -> float | None:
    """Seconds of a grpc-timeout. Raises ValueError."""
    found = _TIMEOUT.match(value)
    if found is None:
        raise ValueError(f"grpc-timeout {value[:32]!r} is none")
    return int(found[1]) * _UNIT_S[found[2]]


def metadata_of(headers: Iterable[tuple[bytes, bytes]]) -> Metadata:
    """The caller's own metadata; values of `-bin` names as bytes. Raises ValueError."""
    out: list[tuple[str, str | bytes]] = []
    for raw_name, raw in headers:
        if raw_name[:1] == b":":
            continue
        name = raw_name.decode("latin-1")
        if name in _RESERVED:
            continue
        if not name.endswith("-bin"):
            out.append((name, raw.decode("latin-1")))
            continue
        for part in raw.split(b","):
            try:
                out.append((name, base64.b64decode(part.strip() + b"=" * (-len(part.strip()) % 4), validate=True)))
            except binascii.Error:
                raise ValueError(f"metadata {name} is not base64") from None
    return tuple(out)


def headers_of(metadata: Sequence[tuple[str, str | bytes]]) -> list[tuple[bytes, bytes]]:
    """Metadata as header fields."""
    out = []
    for name, value in metadata:
        if name.endswith("-bin"):
            raw = value if isinstance(value, bytes) else value.encode()
            out.append((name.encode(), base64.b64encode(raw).rstrip(b"=")))
        else:
            out.append((name.encode(), value.encode("latin-1", "replace") if isinstance(value, str) else value))
    return out


def status_message(text: str) -> bytes:
    """A grpc-message: percent-encoded UTF-8, but for printable ASCII."""
    return quote(text, safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~").encode()
