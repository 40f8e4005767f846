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
_WBITS = {"gzip": 31, "deflate": 15}


class BadMessage(ValueError):
    """What arrived is no gRPC message, or a larger one than is taken. `too_large` tells which."""

    def __init__(self, why: str, too_large: bool = False) -> None:
        super().__init__(why)
        self.too_large = too_large


class Assembler:
    """Bytes of a stream become messages. Nothing larger than `max_bytes` is held, compressed or not."""

    __slots__ = ("_buffer", "_encoding", "_max_bytes")

    def __init__(self, max_bytes: int, encoding: str = "identity") -> None:
        self._buffer = bytearray()
        self._max_bytes = max_bytes
        self._encoding = encoding

    def add(self, data: bytes) -> Iterator[tuple[bytes, int]]:
        """The messages that `data` completes, each with its bytes on the wire. Raises BadMessage."""
        self._buffer += data
        while len(self._buffer) >= 5:
            length = int.from_bytes(self._buffer[1:5], "big")
            if length > self._max_bytes:
                raise BadMessage(
                    f"the message of {length} bytes is larger than {self._max_bytes}, the most that is taken",
                    too_large=True,
                )
            if len(self._buffer) < 5 + length:
                return
            flag, message = self._buffer[0], bytes(self._buffer[5 : 5 + length])
            del self._buffer[: 5 + length]
            yield message if flag == 0 else self._decompressed(flag, message), 5 + length

    @property
    def held_bytes(self) -> int:
        """Bytes of a message that is not whole yet."""
        return len(self._buffer)

    def _decompressed(self, flag: int, message: bytes) -> bytes:
        if flag != 1 or self._encoding not in _WBITS:
            raise BadMessage(f"compressed flag {flag} with grpc-encoding {self._encoding!r}")
        inflate = zlib.decompressobj(_WBITS[self._encoding])
        try:
            out = inflate.decompress(message, self._max_bytes)
        except zlib.error as error:
            raise BadMessage(f"the message does not decompress: {error}") from None
        if inflate.unconsumed_tail or not inflate.eof:
            raise BadMessage(f"the message is larger than {self._max_bytes} bytes once decompressed", too_large=True)
        return out


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
