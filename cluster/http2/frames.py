"""HTTP/2 frames: a reader of received frames, and the frames that this server makes itself for every call and every
token. The library h2 makes all other frames.

The reader returns one frame at a time, and applies its limits before it buffers bytes. It replaces h2's FrameBuffer,
which yields all frames of a read in one pass and buffers header blocks of 4 MiB.

Response headers are literals that are not added to the dynamic header table (RFC 7541, 6.2.2), so encoding needs no
state. The first header block of a connection sets the size of this table to zero. After each change of the table's size
limit by the client, the next header block sets the size to zero again.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

from h2.errors import ErrorCodes
from h2.exceptions import FrameDataMissingError, FrameTooLargeError, ProtocolError
from hyperframe.exceptions import HyperframeError, InvalidFrameError
from hyperframe.frame import ContinuationFrame, Frame, HeadersFrame

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD_BYTES = 9
DATA, WINDOW_UPDATE = 0, 8
"""Frame types."""
END_STREAM = 1
MAX_STREAM_ID = 2**31 - 1
_HEAD = struct.Struct("!HBBBL")
MAX_CONTINUATIONS = 16
MAX_SIZE_UPDATES = 2
"""Maximum number of changes of the header table's size at the start of a block. RFC 7541, 4.2, allows two: one to the
smallest size, then one to the final size."""
NO_TABLE = b"\x20"
"""An update of the dynamic table's size to zero, which must come first in a header block."""

_HEADERS, _CONTINUATION = b"\x01", b"\x09"
_END_HEADERS = 4
# Precomputed for short messages, by length. DATA_HEAD: the five bytes of a DATA frame before the stream id (length,
# type 0, no flags). MESSAGE_HEAD: the prefix of a message (uncompressed, length).
DATA_HEAD = tuple(n.to_bytes(3, "big") + b"\x00\x00" for n in range(2048))
MESSAGE_HEAD = tuple(b"\x00" + n.to_bytes(4, "big") for n in range(2048))
_SHORT = tuple(bytes([n]) for n in range(127))


def data_frame(id_bytes: bytes, data: bytes) -> bytes:
    """A DATA frame; `id_bytes` is the stream id in four bytes."""
    return len(data).to_bytes(3, "big") + b"\x00\x00" + id_bytes + data


def literal(name: bytes, value: bytes) -> bytes:
    """Encode a header field as a literal that is neither compressed nor added to the dynamic header table."""
    size = len(value)
    return _literal_name(name) + (_SHORT[size] if size < len(_SHORT) else _length(value)) + value


def block(fields: Sequence[tuple[bytes, bytes]]) -> bytes:
    """Return a header block that contains these fields."""
    return b"".join([literal(name, value) for name, value in fields])


def header_frames(id_bytes: bytes, fields: bytes, *, end_stream: bool, frame_bytes: int = 16_384) -> bytes:
    """Return a HEADERS frame, followed by CONTINUATION frames if the header block exceeds one frame."""
    flags = END_STREAM if end_stream else 0
    if len(fields) <= frame_bytes:
        return len(fields).to_bytes(3, "big") + _HEADERS + bytes([flags | _END_HEADERS]) + id_bytes + fields
    parts = [fields[at : at + frame_bytes] for at in range(0, len(fields), frame_bytes)]
    out = []
    for i, part in enumerate(parts):
        kind = _CONTINUATION if i else _HEADERS
        flag = (0 if i else flags) | (_END_HEADERS if i == len(parts) - 1 else 0)
        out.append(len(part).to_bytes(3, "big") + kind + bytes([flag]) + id_bytes + part)
    return b"".join(out)


@lru_cache(maxsize=256)
def _literal_name(name: bytes) -> bytes:
    """Encode the first part of a literal header field (HPACK): everything before the field's value."""
    return b"\x00" + _length(name) + name


def _length(text: bytes) -> bytes:
    """Encode the length of a string that is not Huffman-coded, with a seven-bit prefix (RFC 7541, 5.1)."""
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


class FrameReader:
    """A reader of the frames of one connection, which keeps the bytes that are not read yet."""

    def __init__(self, max_frame_bytes: int, max_block_bytes: int) -> None:
        """Create the reader of a new connection. `max_frame_bytes`: maximum size of a frame. `max_block_bytes`: maximum
        size of the encoded header fields of one request."""
        self._max_frame_bytes = max_frame_bytes
        self._max_block_bytes = max_block_bytes
        self._data = bytearray()
        self._preface = PREFACE
        self._block: HeadersFrame | None = None
        self._continuations = 0
        self.kind = self.length = self.stream_id = 0
        """`kind`, `length` and `stream_id`: type, length in bytes without the head, and stream id of the frame that
        `peek` has seen."""
        self.plain = self.ends = False
        """`plain`: whether the frame has no flag except END_STREAM and is outside a header block. `ends`: whether
        END_STREAM is set."""

    def allow_frames(self, size: int) -> None:
        """Set the maximum frame size in bytes."""
        self._max_frame_bytes = size

    def feed(self, data: bytes | memoryview) -> None:
        """Add received bytes."""
        self._data += data

    def clear(self) -> None:
        """Drop the unread bytes."""
        self._data.clear()
        self._block = None

    @property
    def size(self) -> int:
        """Number of unread bytes."""
        return len(self._data)

    @property
    def unfinished(self) -> bool:
        """Whether unread bytes or a part of a header block are buffered."""
        return bool(self._data) or self._block is not None

    def peek(self) -> bool:
        """Read the head of the next frame. Returns whether the frame is complete. Raises ProtocolError."""
        if self._preface and not self._read_preface():
            return False
        data = self._data
        size = len(data)
        if size < HEAD_BYTES:
            return False
        high, low, self.kind, flags, stream_id = _HEAD.unpack_from(data)
        self.length = length = high << 8 | low
        if length > self._max_frame_bytes:
            raise FrameTooLargeError(f"Received overlong frame: length {length}, max {self._max_frame_bytes}")
        self.ends = flags == END_STREAM
        self.plain = flags <= END_STREAM and self._block is None
        self.stream_id = stream_id & MAX_STREAM_ID
        return bool(size >= HEAD_BYTES + length)

    @property
    def increment(self) -> int:
        """The window increment in the WINDOW_UPDATE frame that `peek` has seen."""
        return int.from_bytes(self._data[HEAD_BYTES : HEAD_BYTES + 4], "big") & MAX_STREAM_ID

    def body(self) -> bytes:
        """Remove the frame that `peek` has seen, and return the frame's body."""
        end = HEAD_BYTES + self.length
        body = bytes(self._data[HEAD_BYTES:end])
        del self._data[:end]
        return body

    def frame(self) -> Frame | None:
        """Remove the frame that `peek` has seen, and return it; None while a header block is incomplete. Raises
        ProtocolError."""
        head = bytes(self._data[:HEAD_BYTES])
        frame = _parsed(head, self.body())
        if self._block is not None or isinstance(frame, HeadersFrame | ContinuationFrame):
            return self._add_to_block(frame)
        return frame

    def _read_preface(self) -> bool:
        data, preface = self._data, self._preface
        size = min(len(data), len(preface))
        if data[:size] != preface[:size]:
            raise ProtocolError("Invalid HTTP/2 preamble.")
        self._preface = preface[size:]
        del data[:size]
        return not self._preface

    def _add_to_block(self, frame: Frame) -> Frame | None:
        """Add a frame to the header block. Returns the HEADERS frame with the whole block once the block is complete,
        else None. Raises ProtocolError."""
        block = self._block
        if block is None:
            if not isinstance(frame, HeadersFrame):
                raise ProtocolError("CONTINUATION without HEADERS.")
            self._check_block(len(frame.data))
            if "END_HEADERS" in frame.flags:
                _check_size_updates(frame.data)
                return frame
            self._block, self._continuations = frame, 0
            return None
        if not isinstance(frame, ContinuationFrame) or frame.stream_id != block.stream_id:
            raise ProtocolError("Invalid frame during header block.")
        self._continuations += 1
        if self._continuations > MAX_CONTINUATIONS:
            raise _calm_error("Too many CONTINUATION frames.")
        self._check_block(len(block.data) + len(frame.data))
        block.data += frame.data
        if "END_HEADERS" not in frame.flags:
            return None
        _check_size_updates(block.data)
        block.flags.add("END_HEADERS")
        self._block = None
        return block

    def _check_block(self, size: int) -> None:
        if size > self._max_block_bytes:
            raise _calm_error(f"Header block of more than {self._max_block_bytes} bytes.")


def _parsed(head: bytes, body: bytes) -> Frame:
    try:
        frame, _ = Frame.parse_frame_header(memoryview(head))
        frame.parse_body(memoryview(body))
    except InvalidFrameError as error:
        raise FrameDataMissingError("Frame data missing or invalid") from error
    except HyperframeError as error:
        raise ProtocolError("Received frame with non-compliant data") from error
    return frame


def _check_size_updates(block: bytes) -> None:
    """Raise ProtocolError if a header block changes the size of the header table more often than the protocol allows.

    Each byte of a size change costs the decoder microseconds, and is not charged as a header field.
    """
    at = updates = 0
    while at < len(block) and block[at] & 0xE0 == 0x20:
        updates += 1
        if updates > MAX_SIZE_UPDATES:
            raise _calm_error(f"More than {MAX_SIZE_UPDATES} table size updates in a header block.")
        if block[at] & 0x1F == 0x1F:
            at += 1
            while at < len(block) and block[at] & 0x80:
                at += 1
        at += 1


def _calm_error(why: str) -> ProtocolError:
    error = ProtocolError(why)
    error.error_code = ErrorCodes.ENHANCE_YOUR_CALM
    return error
