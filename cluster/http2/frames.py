"""HTTP/2 frames that this server makes itself, for every call and every token. h2 makes all other frames.

Response headers are literals that enter no table (RFC 7541, 6.2.2), so encoding needs no state. The first header block
of a connection sets the table's size to zero, and so does the first block after the client has changed the limit of the
table's size.
"""

from __future__ import annotations

from collections.abc import Sequence

NO_TABLE = b"\x20"
"""An update of the dynamic table's size to zero, which must come first in a header block."""

_HEADERS, _CONTINUATION = b"\x01", b"\x09"
_END_STREAM, _END_HEADERS = 1, 4
# Precomputed for short messages, by length. DATA_HEAD: the five bytes of a DATA frame before the stream id (length,
# type 0, no flags). MESSAGE_HEAD: the prefix of a message (uncompressed, length).
DATA_HEAD = tuple(n.to_bytes(3, "big") + b"\x00\x00" for n in range(2048))
MESSAGE_HEAD = tuple(b"\x00" + n.to_bytes(4, "big") for n in range(2048))


def data_frame(id_bytes: bytes, data: bytes) -> bytes:
    """A DATA frame; `id_bytes` is the stream id in four bytes."""
    return len(data).to_bytes(3, "big") + b"\x00\x00" + id_bytes + data


def literal(name: bytes, value: bytes) -> bytes:
    """A header field that enters no table and is not compressed."""
    return b"\x00" + _length(name) + name + _length(value) + value


def block(fields: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A header block that contains these fields."""
    return b"".join([literal(name, value) for name, value in fields])


def header_frames(id_bytes: bytes, fields: bytes, *, end_stream: bool, frame_bytes: int = 16_384) -> bytes:
    """A HEADERS frame, followed by CONTINUATION frames if the header block exceeds one frame."""
    flags = _END_STREAM if end_stream else 0
    if len(fields) <= frame_bytes:
        return len(fields).to_bytes(3, "big") + _HEADERS + bytes([flags | _END_HEADERS]) + id_bytes + fields
    parts = [fields[at : at + frame_bytes] for at in range(0, len(fields), frame_bytes)]
    out = []
    for i, part in enumerate(parts):
        kind = _CONTINUATION if i else _HEADERS
        flag = (0 if i else flags) | (_END_HEADERS if i == len(parts) - 1 else 0)
        out.append(len(part).to_bytes(3, "big") + kind + bytes([flag]) + id_bytes + part)
    return b"".join(out)


def _length(text: bytes) -> bytes:
    """Encode a string's length as an integer with a seven-bit prefix (RFC 7541, 5.1). The string is not
    Huffman-coded."""
    size = len(text)
    if size < 127:
        return bytes([size])
    size -= 127
    out = bytearray(b"\x7f")
    while size > 127:
        out.append(size & 127 | 128)
        size >>= 7
    out.append(size)
    return bytes(out)
