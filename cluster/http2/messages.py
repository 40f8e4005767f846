"""Encoding and decoding of gRPC's length-prefixed messages, timeouts and metadata.

Source: "gRPC over HTTP2" (PROTOCOL-HTTP2.md of the gRPC repository).
"""

from __future__ import annotations

import base64
import binascii
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple
from urllib.parse import quote

import grpc

Metadata = tuple[tuple[str, str | bytes], ...]

# Header names that belong to the protocol, not to the caller.
_RESERVED = {"te", "content-type", "grpc-timeout", "grpc-encoding", "grpc-accept-encoding", "content-length"}
_TIMEOUT = re.compile(rb"^(\d{1,8})([HMSmun])$")
_UNIT_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
ENCODINGS = ("identity", "gzip", "deflate")
PREFIX_BYTES = 5
"""Size in bytes of a message's prefix, which contains the compressed flag and the length."""
UNCOPIED_BYTES = 65_536
INFLATE_BYTES = 65_536
"""Maximum number of compressed bytes that one step decompresses."""
_WBITS = {"gzip": 31, "deflate": 15}


class BadMessage(ValueError):
    """Error: the received bytes are not a gRPC message, or exceed a limit (`too_large`)."""

    def __init__(self, why: str, too_large: bool = False) -> None:
        super().__init__(why)
        self.too_large = too_large

    @property
    def code(self) -> grpc.StatusCode:
        """The status of a call that ends with this error."""
        return grpc.StatusCode.RESOURCE_EXHAUSTED if self.too_large else grpc.StatusCode.INTERNAL


class Assembler:
    """A splitter of a call's received bytes into messages. A message larger than `max_bytes` is refused."""

    __slots__ = ("_buffer", "_max_bytes")

    def __init__(self, max_bytes: int) -> None:
        self._buffer = bytearray()
        self._max_bytes = max_bytes

    def add(self, data: bytes) -> Iterator[tuple[bytes | bytearray, int, bool]]:
        """Yield a tuple for each message that `data` completes: the message, its size on the wire in bytes, and whether
        it is compressed.

        Raises BadMessage.
        """
        size = len(data)
        if not self._buffer and PREFIX_BYTES <= size <= UNCOPIED_BYTES and data[0] == 0:
            # Most pieces are one whole message, which needs no buffer.
            length = int.from_bytes(data[1:PREFIX_BYTES], "big")
            if length == size - PREFIX_BYTES and length <= self._max_bytes:
                yield data[PREFIX_BYTES:], size, False
                return
        self._buffer += data
        while len(self._buffer) >= PREFIX_BYTES:
            end = self.message_bytes
            if end - PREFIX_BYTES > self._max_bytes:
                raise BadMessage(
                    f"the message has {end - PREFIX_BYTES} bytes; the limit is {self._max_bytes}",
                    too_large=True,
                )
            flag = self._buffer[0]
            if flag > 1:
                raise BadMessage(f"a message's compressed flag must be 0 or 1, but is {flag}")
            if len(self._buffer) < end:
                return
            yield self._pop_message(end), end, flag == 1

    def _pop_message(self, end: int) -> bytes | bytearray:
        """Remove and return the message that ends at `end`. A large message that fills the buffer is not copied:
        allocating 16 MB would block the event loop for 5 to 10 ms."""
        if end == len(self._buffer) and end >= UNCOPIED_BYTES:
            whole, self._buffer = self._buffer, bytearray()
            del whole[:PREFIX_BYTES]
            return whole
        with memoryview(self._buffer) as held, held[PREFIX_BYTES:end] as part:
            message = bytes(part)
        del self._buffer[:end]
        return message

    def clear(self) -> None:
        """Drop the buffered bytes."""
        self._buffer.clear()

    @property
    def held_bytes(self) -> int:
        """Number of buffered bytes of the incomplete message."""
        return len(self._buffer)

    @property
    def message_bytes(self) -> int:
        """Size in bytes of the incomplete message on the wire, with its prefix; 0 before the prefix is complete."""
        return PREFIX_BYTES + int.from_bytes(self._buffer[1:5], "big") if len(self._buffer) >= PREFIX_BYTES else 0

    @property
    def compressed(self) -> bool:
        """Whether the incomplete message is compressed."""
        return bool(self._buffer and self._buffer[0])


class Inflater:
    """A decompressor that decompresses one message in steps. The decompressed message may have at most `max_bytes`."""

    def __init__(self, message: bytes | bytearray, encoding: str, max_bytes: int) -> None:
        """Create the decompressor. Raises BadMessage for an unknown encoding."""
        if encoding not in _WBITS:
            raise BadMessage(f"a message has compressed flag 1, but grpc-encoding is {encoding!r}")
        self._inflate = zlib.decompressobj(_WBITS[encoding])
        self._message = memoryview(message)
        self._at = 0
        self._max_bytes = max_bytes
        self._out = bytearray()

    def step(self, size: int) -> bytes | None:
        """Decompress the next piece of the message: at most INFLATE_BYTES compressed bytes, and at most `size` bytes of
        result. Return the whole message after its last piece, else None. Raises BadMessage."""
        if not self._inflate.eof:
            self._decompress(size)
            if len(self._out) > self._max_bytes:
                why = f"the decompressed message is larger than the limit of {self._max_bytes} bytes"
                raise BadMessage(why, too_large=True)
        return bytes(self._out) if self._inflate.eof else None

    def _decompress(self, size: int) -> None:
        piece: bytes | memoryview = self._inflate.unconsumed_tail
        if not piece:
            piece = self._message[self._at : self._at + INFLATE_BYTES]
            self._at += len(piece)
        if not piece:
            raise BadMessage("cannot decompress the message: it is incomplete")
        try:
            self._out += self._inflate.decompress(piece, size)
        except zlib.error as error:
            raise BadMessage(f"cannot decompress the message: {error}") from None


class RequestHead(NamedTuple):
    """The head of a call. `problem`: the error in the header fields; empty if the fields are valid."""

    path: str
    metadata: Metadata
    timeout_s: float | None
    """Seconds from the receipt of the head to the caller's deadline; None if the call has no deadline."""
    encoding: str
    size: int
    """Size of the decoded header fields in bytes, as HTTP/2 counts it."""
    problem: str = ""
    is_grpc: bool = True

    @classmethod
    def of(cls, headers: Sequence[tuple[bytes, bytes]], size: int) -> RequestHead:
        """Parse the header fields of a request."""
        fields = dict(headers)
        if fields.get(b":method") != b"POST" or not fields.get(b"content-type", b"").startswith(b"application/grpc"):
            return cls("", (), None, "identity", size, is_grpc=False)
        path = fields.get(b":path", b"").decode("latin-1")
        encoding = fields.get(b"grpc-encoding", b"identity").decode("latin-1")
        metadata: Metadata = ()
        try:
            metadata = metadata_of(headers)
            seconds = timeout_s(fields[b"grpc-timeout"]) if b"grpc-timeout" in fields else None
        except ValueError as error:
            return cls(path, metadata, None, encoding, size, str(error))
        return cls(path, metadata, seconds, encoding, size)


def timeout_s(value: bytes) -> float | None:
    """Parse a grpc-timeout header into seconds. Raises ValueError."""
    match = _TIMEOUT.match(value)
    if match is None:
        raise ValueError(f"invalid grpc-timeout header: {value[:32]!r}")
    return int(match[1]) * _UNIT_S[match[2]]


def metadata_of(headers: Iterable[tuple[bytes, bytes]]) -> Metadata:
    """Return the caller's metadata from header fields, without the protocol's own fields and with `-bin` values decoded
    to bytes. Raises ValueError."""
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
                raise ValueError(f"the value of metadata {name} is not valid base64") from None
    return tuple(out)


def headers_of(metadata: Sequence[tuple[str, str | bytes]]) -> list[tuple[bytes, bytes]]:
    """Encode metadata as header fields."""
    out = []
    for name, value in metadata:
        if name.endswith("-bin"):
            raw = value if isinstance(value, bytes) else value.encode()
            out.append((name.encode(), base64.b64encode(raw).rstrip(b"=")))
        else:
            out.append((name.encode(), value.encode("latin-1", "replace") if isinstance(value, str) else value))
    return out


def status_message(text: str) -> bytes:
    """Encode a text as a grpc-message header: UTF-8, with all characters except printable ASCII percent-encoded."""
    return quote(text, safe=" !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~").encode()
