"""The received bytes of one HTTP/1 connection until they are parsed, in pieces of a bounded size."""

from __future__ import annotations

from typing import Final

HEAD_PIECE_BYTES: Final = 4096
"""Number of bytes that are parsed at once outside of a body: about a hundred of the smallest requests, which take a
millisecond."""
BODY_PIECE_BYTES: Final = 16_384
"""Upper bound on the bytes that are parsed at once while a body of unknown length arrives. These bytes may hold
thousands of chunks or some hundred requests."""
LONG_PIECE_BYTES: Final = 1 << 16
"""Upper bound on the bytes that are parsed at once while a body of known length arrives. The parser only copies these
bytes."""
MAX_LENGTH_DIGITS: Final = 18


class ReceivedBytes:
    """The received bytes of one connection that are not parsed yet. Also records which part of a request the parser has
    reached."""

    def __init__(self) -> None:
        self._data = b""
        self._parsed_to = 0
        self._in_head = True
        self._progress = False
        """Whether the last piece ended a head or a request, or held a part of a body."""
        self.head_bytes = 0
        """Number of parsed bytes of an unfinished head."""
        self.in_body = False
        """Whether the parser is between the end of a head and the end of its request."""
        self._body_left = 0
        """Number of bytes of the body that are still to come, if the head states the body's length; otherwise 0 or
        less."""

    @property
    def size(self) -> int:
        """Number of bytes that are not parsed yet."""
        return len(self._data) - self._parsed_to

    def append(self, data: bytes) -> None:
        """Add received bytes."""
        self._data = self._data[self._parsed_to :] + data if self.size else data
        self._parsed_to = 0

    def pop(self) -> bytes:
        """Remove the next piece of the bytes and return it, for the parser."""
        size = max(min(self._body_left, LONG_PIECE_BYTES), BODY_PIECE_BYTES) if self.in_body else HEAD_PIECE_BYTES
        piece = self._data[self._parsed_to : self._parsed_to + size]
        self._parsed_to += len(piece)
        self._in_head, self._progress = True, False
        return piece

    def clear(self) -> None:
        """Drop all bytes that are not parsed yet."""
        self._data, self._parsed_to = b"", 0

    def begin_head(self) -> None:
        """Record that the parser has begun a head."""
        self._in_head = True

    def end_head(self) -> None:
        """Record that the parser is past the head: in a body, or at the end of a request."""
        self._in_head, self._progress = False, True

    def begin_body(self, length: int) -> None:
        """Record the beginning of a body. `length`: the body's length in bytes, 0 if it is unknown."""
        self.in_body, self._body_left = True, length

    def count_body(self, size: int) -> None:
        """Count `size` parsed bytes of a body."""
        self.end_head()
        self._body_left -= size

    def end_request(self) -> None:
        """Record the end of a request."""
        self.end_head()
        self.in_body = False

    def count_head(self, size: int) -> int:
        """Count a parsed piece of `size` bytes. Returns how many bytes of the current request's head (request line and
        headers) have been parsed so far; 0 if the parser is not within a head."""
        before = 0 if self._progress else self.head_bytes
        self.head_bytes = before + size if self._in_head else 0
        return self.head_bytes


def body_length(headers: list[tuple[bytes, bytes]]) -> int:
    """Return the length of the body according to the headers; 0 if the headers state no length."""
    lengths = [value for name, value in headers if name == b"content-length"]
    if len(lengths) != 1 or any(name == b"transfer-encoding" for name, _ in headers):
        return 0
    return int(lengths[0]) if lengths[0].isdigit() and len(lengths[0]) <= MAX_LENGTH_DIGITS else 0
