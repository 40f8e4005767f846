"""Received bytes are parsed in order and in pieces, and the size of an unfinished head is counted over the pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.apis.http.received_bytes import (
    BODY_PIECE_BYTES,
    HEAD_PIECE_BYTES,
    LONG_PIECE_BYTES,
    ReceivedBytes,
    body_length,
)


@given(
    reads=st.lists(st.binary(min_size=1, max_size=9).map(lambda data: data * 3000), max_size=10),
    length=st.none() | st.integers(0, 1 << 18),
    early=st.integers(0, 5),
)
def test_pieces_are_the_received_bytes_in_order(reads: list[bytes], length: int | None, early: int) -> None:
    """The pieces add up to the received bytes, even if further bytes arrive between two pieces."""
    received, parsed = ReceivedBytes(), b""
    if length is not None:
        received.begin_body(length)
    most = HEAD_PIECE_BYTES if length is None else min(max(length, BODY_PIECE_BYTES), LONG_PIECE_BYTES)
    for data in reads:
        received.append(data)
        for _ in range(early):
            parsed += received.pop()
    while received.size:
        piece = received.pop()
        assert 0 < len(piece) <= most
        parsed += piece
    assert parsed == b"".join(reads)
    received.append(b"late")
    received.clear()
    assert received.size == 0


def test_a_body_is_parsed_in_long_pieces_until_its_length_has_arrived() -> None:
    """A body of known length is parsed in long pieces until its last byte. The head of the next request is parsed in
    short pieces."""
    received = ReceivedBytes()
    received.append(bytes(1 << 20))
    assert len(received.pop()) == HEAD_PIECE_BYTES
    received.begin_body(LONG_PIECE_BYTES + 9)
    assert len(received.pop()) == LONG_PIECE_BYTES
    received.count_body(LONG_PIECE_BYTES)
    assert len(received.pop()) == BODY_PIECE_BYTES
    received.end_request()
    assert len(received.pop()) == HEAD_PIECE_BYTES


def test_a_head_is_counted_over_its_pieces_and_from_its_last_end() -> None:
    """The pieces of one head add up. A piece that holds the end of one head and the beginning of another counts for the
    new head only."""
    received = ReceivedBytes()
    received.pop()
    assert received.count_head(10) == 10
    received.pop()
    assert received.count_head(10) == 20
    received.pop()
    received.end_head()
    received.begin_head()
    assert received.count_head(10) == 10
    received.pop()
    received.end_head()
    assert received.count_head(10) == 0
    assert received.head_bytes == 0


@pytest.mark.parametrize(
    ("headers", "length"),
    [
        ({}, 0),
        ({b"content-length": b"17"}, 17),
        ({b"content-length": b"0017"}, 17),
        ({b"content-length": b"-1"}, 0),
        ({b"content-length": b"+1"}, 0),
        ({b"content-length": b"9" * 5000}, 0),
        ({b"content-length": b"17", b"transfer-encoding": b"chunked"}, 0),
    ],
)
def test_only_a_plain_length_lets_a_body_be_parsed_in_long_pieces(headers: dict[bytes, bytes], length: int) -> None:
    """A body of unknown length is parsed in short pieces, since it may hold thousands of chunks or requests."""
    assert body_length(list(headers.items())) == length
