"""The open calls of a connection count against its limits; removed calls do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import http2
from cluster.http2.call import (
    ANONYMOUS_HEADER_BYTES,
    AUTHENTICATED_FACTOR,
    UNAUTHENTICATED_HEADER_BYTES,
    CallTable,
    ServerCall,
)
from cluster.http2.messages import BadMessage

LIMITS = http2.ServerLimits(max_calls=6, anonymous_calls=2)


@dataclass
class Call:
    """A fake call with the fields that CallTable reads."""

    stream_id: int
    header_bytes: int
    admitted: bool = False
    tenant: str | None = None


def added(table: CallTable, call: Call) -> ServerCall:
    """Create an open call in the table, and return the call."""
    made = cast(ServerCall, call)
    table.add(made)
    return made


def test_the_number_of_calls_is_limited_and_rises_with_the_first_admitted_call() -> None:
    """A connection may have few open calls until its first call is admitted, and more calls afterwards."""
    table = CallTable(LIMITS, 3)
    for stream_id in range(3):
        assert not table.is_full(10)
        added(table, Call(stream_id, 10))
    assert table.is_full(10)
    table.admit()
    assert not table.is_full(10)
    table.remove(0)
    for stream_id in range(3, 7):
        added(table, Call(stream_id, 10))
    assert table.is_full(10)


@given(sizes=st.lists(st.integers(0, UNAUTHENTICATED_HEADER_BYTES), max_size=5), size=st.integers(0, 1 << 20))
def test_header_bytes_of_open_calls_are_limited(sizes: list[int], size: int) -> None:
    """The header fields of all open calls together are limited in bytes. A single call is always allowed."""
    table = CallTable(LIMITS, 6)
    for stream_id, held in enumerate(sizes):
        added(table, Call(stream_id, held))
    assert table.is_full(size) == (bool(sizes) and sum(sizes) + size > UNAUTHENTICATED_HEADER_BYTES)
    table.admit()
    most = UNAUTHENTICATED_HEADER_BYTES * AUTHENTICATED_FACTOR
    assert table.is_full(size) == (bool(sizes) and sum(sizes) + size > most)
    for stream_id in range(len(sizes)):
        assert table.remove(stream_id) is not None
        assert table.remove(stream_id) is None
    assert not table.is_full(1 << 30)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (ANONYMOUS_HEADER_BYTES, 1)])
def test_calls_without_a_credential_are_few(sizes: tuple[int, ...]) -> None:
    """Calls without a credential are limited by number and by header bytes. After one of them ends, another is
    accepted."""
    table = CallTable(LIMITS, 6)
    calls = [added(table, Call(stream_id, size, admitted=True)) for stream_id, size in enumerate(sizes)]
    for call in calls[:-1]:
        table.count_anonymous(call)
    with pytest.raises(BadMessage):
        table.count_anonymous(calls[-1])
    for call in calls:
        table.remove(call.stream_id)
    table.count_anonymous(added(table, Call(9, 1, admitted=True)))
